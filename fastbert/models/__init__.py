"""BERT, RoBERTa and DistilBERT: configuration, inputs, encoder, heads, checkpoints."""
