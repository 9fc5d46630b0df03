"""Text to token ids and back: tokenizer, chat template, incremental detokenizer, stop strings; and
grammars that text must follow, and the parsing of tool calls and reasoning in it."""
