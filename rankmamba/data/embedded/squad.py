"""rankmamba/squad and rankmamba/squad-long: crowd questions on Wikipedia, New York Times, Reddit and Amazon paragraphs, to test on.

The paragraphs come in a task of the BIG-bench source archive that `nq` takes its queries from (SQuAD 1.1's development part and the
four sets of "The Effect of Natural Distribution Shift on Question Answering Models", arXiv 2004.14444). They keep their article, so
consecutive ones can be joined into long documents in which the answer is often far from the beginning. Nothing is trained on them.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/"
# Reddit's comments have no order, so they cannot be joined
FILES = {
    "squaddev_v1.1.json": "wiki",
    "new_wiki_v1.0.json": "wiki",
    "nyt_v1.0.json": "nyt",
    "amazon_reviews_v1.0.json": "amazon",
    "reddit_v1.0.json": "reddit",
}
LONG = ("wiki", "nyt", "amazon")


class Paragraph(NamedTuple):
    """One paragraph, the article that it is from, and the questions that it answers."""

    domain: str
    article: str
    text: str
    questions: list[str]


class Prepared(NamedTuple):
    """The set as it is written: {doc_id: text}, {query_id: text}, rows (query_id, doc_id, 1), and for each query where its paragraph
    begins in the document, in words. Ids begin with the domain: nyt-00012."""

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: list[tuple[str, str, int]]
    starts: dict[str, int]


def read_paragraphs(archive: Path) -> list[Paragraph]:
    """Stream the five sets out of the archive, whose SHA-256 `fetch` has checked; a question comes once per paragraph."""
    found: dict[str, list[Paragraph]] = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            name = member.name.removeprefix(FOLDER)
            if name in FILES:
                found[name] = list(_paragraphs(FILES[name], json.load(tar.extractfile(member))["data"]))
            if len(found) == len(FILES):
                break
    return [paragraph for name in FILES for paragraph in found[name]]


def _paragraphs(domain: str, articles: list[dict]) -> Iterator[Paragraph]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            questions = [" ".join(answered["question"].split()) for answered in paragraph["qas"]]
            text = " ".join(paragraph["context"].split())
            yield Paragraph(domain, article["title"], text, [question for question in dict.fromkeys(questions) if question])


def prepare(paragraphs: list[Paragraph], words: int | None) -> Prepared:
    """Make documents of up to `words` words from consecutive paragraphs of one article; None keeps every paragraph on its own.

    A longer paragraph is a document alone. The document that holds a question's paragraph is the relevant one.
    """
    result = Prepared({}, {}, [], {})
    chosen = paragraphs if words is None else [paragraph for paragraph in paragraphs if paragraph.domain in LONG]
    for document in _documents(chosen, words):
        doc_id = f"{document[0].domain}-d{len(result.documents):05d}"
        result.documents[doc_id] = "\n".join(paragraph.text for paragraph in document)
        start = 0
        for paragraph in document:
            for question in paragraph.questions:
                query_id = f"{paragraph.domain}-q{len(result.queries):05d}"
                result.queries[query_id] = question
                result.qrels.append((query_id, doc_id, 1))
                result.starts[query_id] = start
            start += len(paragraph.text.split())
    return result


def _documents(paragraphs: list[Paragraph], words: int | None) -> Iterator[list[Paragraph]]:
    """Yield the paragraphs of each document."""
    document: list[Paragraph] = []
    length = 0
    for paragraph in paragraphs:
        size = len(paragraph.text.split())
        same = document and (paragraph.domain, paragraph.article) == (document[-1].domain, document[-1].article)
        if document and (words is None or not same or length + size > words):
            yield document
            document, length = [], 0
        document.append(paragraph)
        length += size
    if document:
        yield document
