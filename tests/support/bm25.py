"""BM25 and reciprocal rank fusion in plain Python: the truth for search by words and by both."""

import math
import re
from collections import Counter


def words(text):
    """Return the words of a text, as the analyzer `standard` of Milvus Lite cuts them."""
    return re.findall(r"\w+", text.lower())


def bm25(query, texts, k1=1.2, b=0.75):
    """Return the BM25 score of every text for a query (Robertson and Zaragoza 2009)."""
    bags = [Counter(words(text)) for text in texts]
    length = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(texts)
    for word, weight in Counter(words(query)).items():
        having = sum(word in bag for bag in bags)
        rarity = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
        for place, bag in enumerate(bags):
            if word in bag:
                saturation = bag[word] + k1 * (1 - b + b * bag.total() / length)
                scores[place] += weight * rarity * bag[word] * (k1 + 1) / saturation
    return scores


def reciprocal_rank_fusion(*rankings, k=60):
    """Return the sum of 1 / (k + rank) over the rankings for every member."""
    gains = {}
    for ranking in rankings:
        for rank, member in enumerate(ranking, 1):
            gains[member] = gains.get(member, 0.0) + 1 / (k + rank)
    return gains
