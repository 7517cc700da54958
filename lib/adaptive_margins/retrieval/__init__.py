"""Rankings: BM25, exact search, reranking, and FAISS indexes."""
