"""rankmamba/nq: Natural Questions passages and queries, restored from a task of the BIG-bench source archive.

The archive (bigbench 1.0.0 of the Python Package Index) carries 17,528 search queries, each with its Wikipedia passage in which
the answer is swapped for another name; the true name is stored beside it. What is done, in order: the answer is put back
(`read_examples`), the tokenised text is joined again (`tidy`), equal passages become one, revisions of one passage are found
(`near_copies`), and groups of them are assigned to train, dev and test (`deal`).
"""

import hashlib
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse
from tqdm import tqdm

from ..sources import Source, say

SOURCE = Source(
    "bigbench==1.0.0",
    "bigbench-1.0.0.tar.gz",
    358_249_635,
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/contextual_parametric_knowledge_conflicts/task.json"

SPLITS = ("train", "dev", "test")
HELD_OUT = {"test": 1500, "dev": 500}  # passages
SAME_GROUP, SAME_PASSAGE = 0.3, 0.8  # shared word 8-grams, as a share of the shorter passage's


# --------------------------------------------------------------------------------------------------------------- restoring


class Example(NamedTuple):
    """One query with its restored, still tokenised passage and the answer."""

    query: str
    passage: str
    answer: str


def read_examples(archive: Path) -> list[Example]:
    """Stream the task out of the archive, whose SHA-256 `fetch` has checked, and put the true answers back."""
    with tarfile.open(archive, "r|gz") as tar:
        task = next(json.load(tar.extractfile(member)) for member in tar if member.name == MEMBER)
    examples = []
    for example in task["examples"]:
        match = re.match(r"\s*Question:\s*(.*?)\?\nContext:\s*(.*)\s*$", example["input"], re.DOTALL)
        answer = next(name for name, score in example["target_scores"].items() if score == 0)
        # the task swapped the name by plain string replacement, inside longer words too; the reverse undoes exactly that
        examples.append(Example(match[1], match[2].replace(example["target"], answer), answer))
    return examples


# ------------------------------------------------------------------------------------------------------------------ tidying

_LIST_TAG = re.compile(r"\s*</?(?:Dd|Dt|Dl|Ol|Ul|Li|Table|Tr|Th|Td|P|H[1-6])>\s*")
_INVISIBLE = re.compile(" ?[\u200b\u200c\u200e\u200f\u202a-\u202e\ufeff]+")
_SORT_KEY = re.compile(r"\b\d{15,} ♠ ")  # left over from the tables of Wikipedia
# "Ann Lee - guitar", an item of a list, had a dash between spaces; anywhere else "word - word" was a compound
_ROLE = re.compile(r"^(?:[^\W\d_a-z][\w.'’-]* ){2,3}(?=- [a-z])")

_CLITIC = re.compile(r"(?:'(?:s|m|re|ve|ll|d|t)|n't)\b", re.IGNORECASE)
_SPLIT_WORDS = {"na": ("gon", "wan"), "ta": ("got",), "me": ("gim", "lem"), "not": ("can",)}
_ELIDED = re.compile(r"(?:\w\w+in|ol|an|o|th|n|de|mo|li|til)$", re.IGNORECASE)  # rockin', ol', rock n'
_CLIPPED = re.compile(r"(?:\d\ds?|em|til|cause|cuz|round|bout|twas|tis)$", re.IGNORECASE)  # '90s, 'em
_NOT_POSSESSIVE = frozenset("is was as has this says sings plays means does titles uses its us calls".split())
_MONTHS = frozenset("January February March April May June July August September October November December".split())
_PAIRS = frozenset("and/or he/she she/he him/her his/her km/h m/s mi/h w/o ac/dc b/w n/a s/he".split())


def tidy(text: str) -> str:
    """Join tokenised English again: do n't -> don't, `` so '' -> "so", ( 3 : 09 ) -> (3:09), 1980 -- 1989 -> 1980–1989.

    List items, which the source separates by three spaces or HTML list tags, become lines.
    """
    text = re.sub(" ?\xa0 ?", " ", _INVISIBLE.sub("", text))
    text = _SORT_KEY.sub("", _LIST_TAG.sub("   ", text))
    lines = (_join(line) for line in re.split(r"\s{2,}|\n", text))
    return "\n".join(line for line in lines if line)


def _join(line: str) -> str:
    """Join the tokens of one line, each with or without a space before it."""
    tokens = line.split()
    role = _ROLE.match(line)
    role_dash = len(role[0].split()) if role else -1
    result, glued, in_quote = [], True, False
    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i else ""
        after = tokens[i + 1] if i + 1 < len(tokens) else ""
        if token.rstrip("?") == "'":
            in_quote, left, right = _apostrophe(tokens, i, in_quote)
        elif i == role_dash:
            left, right = False, False
        elif token == "--" and re.fullmatch(r"\d{4}", before) and tokens[i + 2 : i + 3] and tokens[i + 2] in _MONTHS:
            token, left, right = "–", False, False  # 21 September 1842 – 10 February 1918
        else:
            token, left, right = _sides(token, before, after, tokens[i + 2] if i + 2 < len(tokens) else "")
        if not (glued or left):
            result.append(" ")
        result.append(token)
        glued = right
    return "".join(result)


def _sides(token: str, before: str, after: str, second_after: str) -> tuple[str, bool, bool]:
    """Return the token as it is written, and whether it touches the one before and the one after."""
    if token.isalnum() and token != "n" and token.lower() not in _SPLIT_WORDS:  # most are plain words
        return token, False, False
    digits_before, digits_after = before[-1:].isdigit(), after[:1].isdigit()
    word_before, word_after = before[-1:].isalnum() or before[-1:] == ".", after[:1].isalnum()
    if token == "``":
        return '"', False, True
    if token == "''":
        return '"', True, False
    if token == "(":
        return token, False, True
    if re.fullmatch(r"[),.;?!%′″]+", token):
        return token, True, (before, token, after) == ("P", "!", "nk")
    if token == ":":
        time_of_day = re.fullmatch(r"\d{1,3}", before) and re.fullmatch(r"\d{1,2}(\.\d+)?", after)
        return token, True, bool(time_of_day)
    if _CLITIC.match(token):
        return token, before not in {"``", "("}, False
    if (token == "n" and after == "'t") or before.lower() in _SPLIT_WORDS.get(token.lower(), ()):
        return token, True, False
    if token == "-":
        suspended = after in {"and", "or", "to"} and second_after != "-"  # first- and second-place, but face-to-face
        touches = word_before and (word_after or after in {"'", ")"})
        return token, touches, (touches and after != ")" and not suspended) or (before == "(" and word_after)
    if token == "--":
        span = digits_before and (digits_after or after in {"present", "Present"})
        return "–", span or after == ")", span
    if token in {"$", "£", "€", "#"}:
        return token, False, digits_after
    if token == "+":
        return token, digits_before and after[:1].islower(), False
    if token == "°":
        degrees = re.match(r"[CF]\b", after) is not None
        return token, not degrees, degrees
    if token == "/":
        joined = (digits_before and digits_after) or f"{before}/{after}".lower() in _PAIRS
        return token, joined, joined
    if token == "*":
        letters = len(before) == 1 and word_after
        return token, letters or before == "*" or digits_before or after == "*", letters or before == "*" or after == "*"
    return token, False, False


def _apostrophe(tokens: list[str], i: int, in_quote: bool) -> tuple[bool, bool, bool]:
    """Decide what a lone ' is: (inside a quotation after it?, touches the token before?, touches the token after?)."""
    before = tokens[i - 1] if i else ""
    after = tokens[i + 1] if i + 1 < len(tokens) else ""
    if before == "'" or tokens[i + 1 : i + 3] == ["n", "'"]:  # rock 'n' roll
        return in_quote, False, True
    if in_quote or tokens[i] != "'" or not after or tokens[i - 2 : i] == ["'", "n"]:
        return False, True, False
    if _CLIPPED.match(after):
        return False, before == "-", True
    if not before or not (before[-1].isalnum() or before[-1] in ".!"):
        return True, False, True
    if not after[0].isalnum() and after != "``":
        return False, True, False
    closing = next((j for j in range(i + 2, min(len(tokens), i + 14)) if tokens[j].rstrip("?") == "'"), None)
    possessive = before[-1] in "sSzx" and before.lower() not in _NOT_POSSESSIVE
    if possessive or _ELIDED.match(before):
        closed_by = tokens[closing - 1] if closing else "s"
        if _ELIDED.match(before) or closed_by[-1] in "sSzx" or _ELIDED.match(closed_by):
            return False, True, False
    opening = closing is not None or (before.islower() and after[0].isupper() and not possessive)
    return closing is not None, not opening, opening


# ------------------------------------------------------------------------------------------------------- passages and splits


def _fingerprint(text: str) -> str:
    """What makes two texts equal: their words, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def near_copies(fingerprints: Sequence[str]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Find passages that share word 8-grams, counted as a share of the shorter passage's: (group of each, copies of each).

    Sharing `SAME_GROUP` puts two passages in one group, also through a third; sharing `SAME_PASSAGE` makes them copies.
    """
    grams, holders = [], defaultdict(list)
    for i, words in enumerate(map(str.split, fingerprints)):
        grams.append({tuple(words[j : j + 8]) for j in range(max(1, len(words) - 7))})
        for gram in grams[-1]:
            holders[gram].append(i)
    shared = Counter(
        (first, second) for ids in holders.values() if len(ids) > 1 for n, first in enumerate(ids) for second in ids[n + 1 :]
    )
    copies: list[list[int]] = [[] for _ in fingerprints]
    joined = []
    for (first, second), count in shared.items():
        share = count / min(len(grams[first]), len(grams[second]))
        if share >= SAME_GROUP:
            joined.append((first, second))
        if share >= SAME_PASSAGE:
            copies[first].append(second)
            copies[second].append(first)
    one, other = np.array(joined, dtype=int).reshape(-1, 2).T
    links = sparse.coo_array((np.ones(len(joined)), (one, other)), shape=(len(fingerprints), len(fingerprints)))
    _, groups = sparse.csgraph.connected_components(links, directed=False)
    return groups.tolist(), [tuple(sorted(ids)) for ids in copies]


def deal(fingerprints: Sequence[str], groups: Sequence[int]) -> list[str]:
    """Assign whole groups of passages to the splits in the order of a hash of their text: test, then dev, and the rest to train."""
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    order = sorted(members.values(), key=lambda ids: hashlib.sha256(min(fingerprints[i] for i in ids).encode()).digest())
    split_of, left = [""] * len(fingerprints), {**HELD_OUT}
    for ids in order:
        split = next((name for name, count in left.items() if count > 0), "train")
        left[split] = left.get(split, 0) - len(ids)
        for i in ids:
            split_of[i] = split
    return split_of


class Prepared(NamedTuple):
    """The set as it is written: {doc_id: text}, and for each split {query_id: text} and rows (query_id, doc_id, 1)."""

    documents: dict[str, str]
    queries: dict[str, dict[str, str]]
    qrels: dict[str, list[tuple[str, str, int]]]


def prepare(examples: Sequence[Example]) -> Prepared:
    """Tidy, drop repetitions, and split.

    Passages with the same words are one document. A query that occurs in two splits stays in the one that is held out more (test,
    dev, train). Relevant to a query are its passage and those copies of it that contain the answer too.
    """
    doc_of: dict[str, int] = {}
    texts: list[str] = []
    rows = []
    for example in tqdm(examples, "restoring passages", unit=" queries", mininterval=1):
        text = tidy(example.passage)
        i = doc_of.setdefault(_fingerprint(text), len(texts))
        if i == len(texts):
            texts.append(text)
        rows.append((tidy(example.query), i, tidy(example.answer)))
    fingerprints = list(doc_of)
    say("looking for revisions of the same passage")
    groups, copies = near_copies(fingerprints)
    split_of = deal(fingerprints, groups)
    doc_ids = [f"d{i:05d}" for i in range(len(texts))]
    result = Prepared(dict(zip(doc_ids, texts, strict=True)), {s: {} for s in SPLITS}, {s: [] for s in SPLITS})
    ids: dict[str, tuple[str, str]] = {}  # fingerprint of a query -> split, query_id
    for split in ("test", "dev", "train"):
        relevant: dict[str, dict[str, None]] = defaultdict(dict)
        for number, (query, i, answer) in enumerate(rows):
            if split_of[i] != split:
                continue
            home, query_id = ids.setdefault(_fingerprint(query), (split, f"q{number:05d}"))
            if home == split:
                result.queries[split].setdefault(query_id, query)
                for j in (i, *(j for j in copies[i] if answer in texts[j])):
                    relevant[query_id][doc_ids[j]] = None
        result.qrels[split].extend((query_id, doc_id, 1) for query_id, ids_ in relevant.items() for doc_id in ids_)
    return result
