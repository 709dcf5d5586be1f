"""The ranking panel: one query, every system's list, and what in a document moved its score."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import ipywidgets as widgets

from ..errors import InputError
from ..evaluate import BASELINE
from ..search import Ranking, Search, query_words
from .controls import Controls, Panel, choice, in_row
from .job import Job
from .pages import SHOWN, document_html, lists_html


@dataclass
class Answer:
    """What is known about one query; `lists` grows as systems finish."""

    query: str
    words: set[str]
    judged: dict[str, int]
    texts: dict[str, str] = field(default_factory=dict)
    lists: dict[str, Ranking] = field(default_factory=dict)


class RankingPanel(Panel):
    """Rank the documents of a collection for any query, by BM25 and by rerankers, side by side.

    queries: to pick from; any other can be typed. top_k: candidates that the rerankers reorder. A list shows as soon as its
    system is done. Causal systems can store the states of all documents and then answer from them.
    """

    def __init__(self, search: Search, queries: Sequence[str], top_k: int = 20):
        self._search, self._answer, self._known, self._offering, self._offered = search, None, {}, False, None
        wide, narrow = widgets.Layout(width="540px"), widgets.Layout(width="340px")
        self.pick = widgets.SelectionSlider(
            options=[("", ""), *((text, text) for text in queries)],
            description="pick",
            continuous_update=False,
            readout=False,
            layout=wide,
        )
        self.query = widgets.Text(description="or type", placeholder="a query, then Enter", continuous_update=False, layout=wide)
        self.top_k = widgets.IntSlider(
            top_k, min=1, max=max(100, top_k), description="candidates", continuous_update=False, layout=narrow
        )
        self.systems = [
            widgets.Checkbox(
                True,
                description=system,
                indent=False,
                layout=widgets.Layout(width="auto", margin="0 16px 0 0"),
            )
            for system in search.models
        ]
        self.document = widgets.SelectionSlider(
            options=[("", "")], description="document", layout=widgets.Layout(width="900px", max_width="100%")
        )
        self.document.add_class("rm-wide")
        self.judge = choice(search.models, "as read by")
        self.lists, self.text = widgets.HTML(), widgets.HTML()
        self.ranking = Controls("Rank", self._rank, self._draw_lists, unit="document")
        self.reading = Controls("Read", self._read, self._draw_document, unit="sentence")
        self.storing = Controls("Store states", self._store, self._draw_stored, unit="document")
        self.storing_takes = widgets.HTML()
        self.storing_takes.add_class("rm-note")
        self.stored = widgets.VBox([self.storing.row(), self.storing_takes, self.storing.error])
        self.below = widgets.VBox([self.document, self.judge, self.reading.row(), self.reading.error, self.text])
        self.below.layout.display = "none"
        self.pick.observe(self._pick, "value")
        for widget in (self.query, self.top_k, *self.systems):
            widget.observe(self._ask, "value")
        for box in self.systems:
            box.observe(self._tick, "value")
        for widget in (self.document, self.judge):
            widget.observe(self._open, "value")
        systems = in_row([widgets.Label("rerank with", layout=widgets.Layout(margin="0 10px 0 16px")), *self.systems])
        asking = [self.pick, in_row([self.query, self.top_k]), systems, self.ranking.row()]
        super().__init__(
            [*asking, self.ranking.error, self.stored, self.lists, self.below], [self.ranking, self.reading, self.storing]
        )
        self._offer_storing()

    def _tick(self, change) -> None:
        self.storing.error.value = ""  # "tick one" has been heard
        self._offer_storing()

    def _pick(self, change) -> None:
        if change["new"]:
            self.query.value = change["new"]

    def _ask(self, change) -> None:
        if self.query.value.strip():
            self.ranking.begin()

    def _rank(self, job: Job) -> Answer:
        query, top_k = self.query.value.strip(), self.top_k.value
        systems = self._ticked()
        answer = self._answer = Answer(query, query_words(query), self._search.judgements(query))
        first = self._search.candidates(query, top_k)
        answer.texts |= self._search.texts(first.doc_ids)
        answer.lists[BASELINE] = first
        scored, total = 0, len(systems) * len(first.doc_ids)

        def on_scored(count: int) -> None:
            nonlocal scored
            scored += count
            job.report(scored, total)

        for system in systems:
            key = (system, query, top_k)
            if key in self._known:
                on_scored(len(first.doc_ids))
            elif (ranking := self._search.rerank(system, query, first.doc_ids, on_scored, job.stop)) is None:
                return answer
            else:
                self._known[key] = ranking
            answer.lists[system] = self._known[key]
        return answer

    def _ticked(self) -> list[str]:
        return [box.description for box in self.systems if box.value]

    def _store(self, job: Job) -> None:
        """Store the states of all documents for the ticked systems that can have them."""
        systems = self._to_store()
        done, total = 0, len(systems) * len(self._search.collection.documents)
        if not systems:
            raise InputError(f"expected a ticked system among {', '.join(self._search.storable())}, got none; tick one")

        def on_stored(count: int) -> None:
            nonlocal done
            done += count
            job.report(done, total)

        for system in systems:
            self._search.store(system, on_stored, job.stop)
            if job.stop.is_set():
                return
            self._known = {key: ranking for key, ranking in self._known.items() if key[0] != system}

    def _to_store(self) -> list[str]:
        return [system for system in self._search.storable() if system in self._ticked()]

    def _draw_stored(self, job: Job) -> None:
        if job.ended.is_set():
            self._offer_storing()
            if job.state == "finished":
                self._ask(None)

    def _offer_storing(self) -> None:
        """Offer to store states as long as a system could have them and does not, and say how long it takes."""
        systems = self._to_store()
        self.stored.layout.display = "" if self._search.storable() else "none"
        documents = len(self._search.collection.documents)
        rankings = {key[0]: ranking for key, ranking in list(self._known.items()) if ranking.doc_ids}
        about = "how long that takes, and how much of the disk, is known once a query has been ranked"
        if systems and set(systems) <= set(rankings):  # none of these has answered from states yet
            rates = [rankings[system].seconds / len(rankings[system].doc_ids) for system in systems]
            size = sum(self._search.states_gb(system, rankings[system].doc_ids) for system in systems)
            about = f"about {documents * sum(rates) / 60:,.1f} minutes and {size:,.2g} GB of disk, judged by the last ranking"
        self.storing_takes.value = (
            f"Store states reads all {documents:,} documents with {' and '.join(systems) or 'each ticked system that has states'}: "
            f"{about}. Stop keeps what is done; the next time resumes there."
        )

    def _draw_lists(self, job: Job) -> None:
        answer = self._answer
        if answer is None or BASELINE not in answer.lists:
            return
        if not answer.lists[BASELINE].doc_ids:
            if not answer.query:
                self.lists.value = "Pick a query, or type one."
            elif not answer.words:
                self.lists.value = "BM25 looks for none of these: common words, single characters or signs. Add another word."
            else:
                self.lists.value = "No document has a word of this query: try another one."
            self.below.layout.display = "none"
            return
        if answer.query != self._offered:
            self.below.layout.display = "none"  # it is about another query
        if job.ended.is_set():  # even where a system failed: what is shown below must belong to these lists, not to earlier ones
            self._offer(answer)
            self._offer_storing()
        self._show_lists()

    def _show_lists(self) -> None:
        answer = self._answer
        lists = dict(answer.lists)  # the job may be adding to it
        self.lists.value = lists_html(lists, answer.texts, answer.judged, answer.words, self.document.value)

    def _offer(self, answer: Answer) -> None:
        """Offer the documents that the lists show, and open the one open before, or the first of the last list."""
        shown = {}
        for system, ranking in reversed(answer.lists.items()):
            for place, doc_id in enumerate(ranking.doc_ids[:SHOWN], 1):
                shown.setdefault(doc_id, f"{system} {place} · {answer.texts[doc_id][:80]}")
        wanted = self.document.value if self.document.value in shown else next(iter(shown))
        self._offering = True
        try:
            self.document.options = [(label, doc_id) for doc_id, label in shown.items()]
            self.document.value = wanted
        finally:
            self._offering = False
        self._offered = answer.query
        self.below.layout.display = ""
        self._open()

    def _open(self, change=None) -> None:
        # not before BM25 has answered, nor after it failed
        listed = self._answer is not None and BASELINE in self._answer.lists
        if listed and not self._offering and self.document.value and self.judge.value:
            self._show_lists()
            self.text.value = ""
            self.reading.begin()

    def _read(self, job: Job) -> tuple | None:
        system, answer = self.judge.value, self._answer
        parts = self._search.occlusion(system, answer.query, self.document.value, job.report, job.stop)
        return None if parts is None else (parts, answer.words, system)

    def _draw_document(self, job: Job) -> None:
        if job.result is not None:
            self.text.value = document_html(*job.result)
