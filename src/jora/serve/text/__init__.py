"""Between tokens and text: incremental detokenisation with stop strings, and grammars."""
