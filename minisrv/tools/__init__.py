"""Commands that measure, explain or check an engine, and serve nobody."""
