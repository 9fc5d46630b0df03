"""The HTTP side of minisrv: OpenAI's completions and chat completions, served through the engine
client."""
