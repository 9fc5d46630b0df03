"""The fields of OpenAI's, vLLM's and Anthropic's APIs that are known here and not supported.

Each maps to the values that ask for nothing, which are accepted, as clients send them without
thinking. Any other value is refused by name, because ignoring it would give another answer than the
client asked for. A field with no such value is refused whenever it is present.

Knows: names and neutral values. When a field becomes supported, its line here is removed.
"""

from __future__ import annotations

import json

EVERYWHERE: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (),
    "best_of": (1,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "request_id": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

COMPLETION_ONLY: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "suffix": ("",),
}

CHAT_ONLY: dict[str, tuple[object, ...]] = {
    # OpenAI
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    # vLLM
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

EMBEDDINGS: dict[str, tuple[object, ...]] = {
    # vLLM
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "normalize": (True,),
    "request_id": (),
}

TOKENIZE: dict[str, tuple[object, ...]] = {
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}

STRUCTURED_OUTPUTS: dict[str, tuple[object, ...]] = {
    # vLLM
    "disable_additional_properties": (True,),  # as it is here unless the schema says otherwise
    "disable_any_whitespace": (False,),
    "disable_fallback": (True,),
    "structural_tag": (),
    "whitespace_pattern": (),
}

MESSAGES_PROMPT: dict[str, tuple[object, ...]] = {
    # Anthropic
    "container": (),
    "context_management": ({"edits": []},),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
}

MESSAGES_OUTPUT: dict[str, tuple[object, ...]] = {
    "effort": ("high",),  # which is Anthropic's default
}

MESSAGES_TOOL: dict[str, tuple[object, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "input_examples": ([],),
}

RESPONSES_BODY: dict[str, tuple[object, ...]] = {
    # OpenAI
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "prompt": (),
}

RESPONSES_REASONING: dict[str, tuple[object, ...]] = {
    "context": ("auto",),
    "generate_summary": (),
    "mode": ("standard",),
}

RESPONSES_TOOL: dict[str, tuple[object, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}

MESSAGE: dict[str, tuple[object, ...]] = {
    # Content that a template would never see, and other names of continue_final_message.
    "attachments": ([],),
    "audio": (),
    "images": ([],),
    "partial": (False,),
    "prefix": (False,),
}


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether `value` is one of the neutral values; true does not equal 1 here, but 1.0 does."""
    return any(
        isinstance(value, bool) == isinstance(candidate, bool) and value == candidate
        for candidate in neutral
    )


def refusal(name: str, neutral: tuple[object, ...]) -> str:
    """Return the message for a client that asked for an unsupported field."""
    allowed = " or ".join(json.dumps(value) for value in neutral)
    return f"{name} is not supported by this server; leave it out" + (
        f" or send {allowed}." if allowed else "."
    )
