"""What `make demo` shows: a small corpus, searched by vector and sorted again by a reranker, if there is one."""

import sys
import tempfile

from runtime import Embedder, Reranker, Retriever

CORPUS = [
    "A small plane flies over the ocean.",
    "A woman waits for her plane at the airport.",
    "The wild yeast makes the bread rise slowly.",
    "A man is playing the guitar on a stage.",
    "A boy is listening to music on the train.",
    "Share prices fell after the bank raised interest rates.",
    "The bank of the river is covered with grass.",
    "Two cats are sleeping on the sofa.",
]
QUERIES = ["An aircraft is in the air.", "Someone gives a concert.", "The stock market lost value."]

embedder = Embedder(sys.argv[1])
reranker = Reranker(sys.argv[2]) if len(sys.argv) > 2 else None
with tempfile.TemporaryDirectory() as folder:
    retriever = Retriever(folder, embedder, reranker)
    retriever.add(CORPUS)
    retriever.save()
    stages = [model.manifest.name for model in (embedder, reranker) if model]
    print(f"\n{len(CORPUS)} passages, ranked by {', then '.join(stages)} ({embedder.variant})")
    for query in QUERIES:
        print(f"\n{query}")
        for rank, hit in enumerate(retriever.search(query, top_k=3), 1):
            logit = "" if hit.rerank_score is None else f"{hit.rerank_score:7.2f}"
            print(f"  {rank}. {hit.score:.3f}{logit}  {hit.text}")
    retriever.close()
if reranker is None:
    print("\nNo reranker could be had, so this was the first stage alone: make demo RERANKER=<name, hub id or folder>")
