"""The HTTP face: OpenAI's completions and chat completions over the engine client."""
