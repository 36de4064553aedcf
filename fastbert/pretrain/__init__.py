"""Pretraining: settings, data, masked words and next sentences, evaluation."""
