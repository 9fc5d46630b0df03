"""A load generator for OpenAI-compatible servers. It knows HTTP and nothing of any one server."""
