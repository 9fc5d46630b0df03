"""A load generator for OpenAI-compatible servers, which depends on HTTP and on no single server."""
