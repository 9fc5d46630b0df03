"""The HTTP side of minisrv: OpenAI's completions and chat completions, and Anthropic's messages,
served through the engine client."""
