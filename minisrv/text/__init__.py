"""Text to token ids and back: tokenizer, chat template, incremental detokenizer, stop strings;
grammars that text must follow, and the tool calls and reasoning found in it."""
