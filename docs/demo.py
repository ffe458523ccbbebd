"""What `make demo` shows: a small search with an exported embedder."""

import sys

from runtime import Embedder

CORPUS = [
    "The wing of an aircraft creates lift because air flows faster over its upper side.",
    "Sourdough bread rises slowly, since wild yeast works more slowly than the baker's.",
    "A reranker reads the query and the passage together, which is slower and more precise.",
    "The stock market fell sharply after the central bank raised interest rates.",
    "Cats sleep between twelve and sixteen hours a day.",
    "Quantisation stores a network's weights in eight bits instead of thirty-two.",
]
QUERIES = ["how do planes fly?", "make a neural network smaller", "why did shares lose value"]

embedder = Embedder(sys.argv[1])
corpus = embedder.encode_corpus(CORPUS)
print(f"\n{embedder.manifest.name} ({embedder.variant}, {embedder.dim} dimensions) on {len(CORPUS)} passages")
for query, vector in zip(QUERIES, embedder.encode_queries(QUERIES), strict=True):
    print(f"\n{query}")
    scores = corpus @ vector
    for rank, i in enumerate(scores.argsort()[::-1][:3], 1):
        print(f"  {rank}. {scores[i]:.3f}  {CORPUS[i]}")
