"""The retrieval index: FAISS vectors beside a Lance document store, in versions that switch atomically."""
