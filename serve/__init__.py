"""The HTTP service: embeddings and search by a trained retriever. Uses the model and index rooms, never training."""
