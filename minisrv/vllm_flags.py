"""Flags of `vllm serve` that minisrv does not have, with the reason and what to use instead.

Users often try a command line here that worked with vLLM. The names are those of vLLM's engine and
server arguments, older ones included. No flag that minisrv has is listed here.

Knows: names and reasons. Knows nothing of argparse, nor which flags minisrv has.
"""

from __future__ import annotations

_ONE_DEVICE = (
    "one engine serves from one GPU or one CPU; for more throughput start a server on each and "
    "balance between them."
)
_NO_REMOTE_CODE = (
    "code of a checkpoint is never run; the models that are served need none, so leave it out."
)
_NO_COMPILATION = (
    "compilation is set by --compilation-mode, graphs by --cudagraph-mode and "
    "--cudagraph-capture-sizes, both by --optimization-level."
)
_ALWAYS_CHUNKED = (
    "prompts are always computed in chunks of what --max-num-batched-tokens leaves beside the "
    "decodes; leave it out."
)
_NO_SWAPPING = (
    "weights and KV cache of a server that is awake stay where they are; a preempted request is "
    "computed again, and --kv-cache-memory sizes the cache."
)
_CACHE_DTYPE = "the KV cache has the serving dtype; --dtype sets both."
_TOOLS = (
    "tool calls need no flag: how the model spells them is read off its chat template, and they "
    "are on for requests with tools; leave it out."
)
_REASONING = "reasoning needs no flag: the markers are read off the chat template; leave it out."
_LOGS = (
    "no line ever holds a prompt or an answer; --disable-uvicorn-access-log turns off the line of "
    "each request, --log-format sets how lines look."
)
_NO_ADAPTERS = "adapters are not supported; merge one into its weights and serve those."
_TEXT_ONLY = "models of text alone are served; leave it out."
_SPECULATIVE = "there is no speculative decoding; leave it out."
_QUANTIZED = "weights are quantised by --quantization int8 (on a CPU) or not at all; leave it out."
_CAPTURE_SIZES = "name every size: --cudagraph-capture-sizes 1 2 4 8 ..."
_SAFETENSORS = "weights are read from safetensors, all of them before it serves; leave it out."
_GENERATION_CONFIG = (
    "the checkpoint's generation_config.json gives the defaults; a request's own fields go before "
    "them."
)
_STRUCTURED = "llguidance keeps every structured output; leave it out."
_ORDER = "requests have a priority field, which is always heeded; leave it out."
_KERNELS = "attention is minisrv's own kernels; leave it out."
_BOUNDS = "request heads are bounded to 64 KiB and bodies to 4 MiB; leave it out."
_TLS = "HTTPS is --ssl-certfile and --ssl-keyfile; put a proxy in front for more."
_METRICS = "/metrics has all that is counted, each graph's steps included; leave it out."
_PLUGINS = "there are no plugins; leave it out."

_REASONS: dict[str, str] = {
    name: why
    for names, why in (
        ("-tp --tensor-parallel-size -pp --pipeline-parallel-size -dp", _ONE_DEVICE),
        ("-ep --enable-expert-parallel --enable-eplb -dcp -pcp -n --nnodes", _ONE_DEVICE),
        ("--decode-context-parallel-size --prefill-context-parallel-size", _ONE_DEVICE),
        ("--distributed-executor-backend --worker-use-ray --engine-use-ray", _ONE_DEVICE),
        ("--node-rank --master-addr --master-port --headless --worker-cls", _ONE_DEVICE),
        ("--disable-custom-all-reduce --max-parallel-loading-workers", _ONE_DEVICE),
        ("--api-server-count", "it is called --api-workers here."),
        ("--trust-remote-code --code-revision", _NO_REMOTE_CODE),
        ("-cc --compilation-config", _NO_COMPILATION),
        ("--max-cudagraph-capture-size --max-seq-len-to-capture", _CAPTURE_SIZES),
        ("--max-context-len-to-capture --cuda-graph-sizes", _CAPTURE_SIZES),
        ("--enable-chunked-prefill --max-num-partial-prefills", _ALWAYS_CHUNKED),
        ("--max-long-partial-prefills --long-prefill-token-threshold", _ALWAYS_CHUNKED),
        ("--num-scheduler-steps --num-lookahead-slots --scheduler-delay-factor", _ALWAYS_CHUNKED),
        ("--swap-space --cpu-offload-gb --preemption-mode", _NO_SWAPPING),
        ("--kv-offloading-size --kv-offloading-backend --kv-transfer-config", _NO_SWAPPING),
        ("--kv-cache-dtype --calculate-kv-scales", _CACHE_DTYPE),
        ("--kv-cache-memory-bytes", "it is called --kv-cache-memory here."),
        ("--num-gpu-blocks-override", "it is called --num-kv-blocks here."),
        ("--prefix-caching-hash-algo", "blocks are named by SHA-256; leave it out."),
        ("--enable-auto-tool-choice --tool-call-parser --tool-parser-plugin", _TOOLS),
        ("--tool-server --exclude-tools-when-tool-choice-none", _TOOLS),
        ("--reasoning-parser --enable-reasoning --reasoning-parser-plugin", _REASONING),
        ("--disable-log-requests --enable-log-requests --max-log-len", _LOGS),
        ("--uvicorn-log-level --log-config-file --enable-log-outputs", _LOGS),
        ("--disable-access-log-for-endpoints --log-error-stack", _LOGS),
        ("--uds", "it listens on --host and --port, not on a Unix socket."),
        ("--allow-credentials --allowed-methods --allowed-headers", "--allowed-origins is all "
         "there is of CORS; any header, GET, POST and DELETE are allowed with it."),
        ("--enable-request-id-headers", "every answer carries x-request-id; leave it out."),
        ("--disable-frontend-multiprocessing", "HTTP has processes of its own: --api-workers."),
        ("--disable-fastapi-docs --enable-offline-docs", "/docs is always there; leave it out."),
        ("--middleware --logits-processors --scheduler-cls --io-processor-plugin", _PLUGINS),
        ("--logits-processor-pattern --worker-extension-cls", _PLUGINS),
        ("--enable-lora --lora-modules --max-loras --max-lora-rank --max-cpu-loras", _NO_ADAPTERS),
        ("--lora-dtype --fully-sharded-loras --enable-prompt-adapter", _NO_ADAPTERS),
        ("--limit-mm-per-prompt --media-io-kwargs --allowed-local-media-path", _TEXT_ONLY),
        ("--allowed-media-domains --skip-mm-profiling --language-model-only", _TEXT_ONLY),
        ("--interleave-mm-strings --enable-mm-embeds --enable-prompt-embeds", _TEXT_ONLY),
        ("--task --runner --convert", "models that generate text are served, and /v1/embeddings "
         "is always there; leave it out."),
        ("--pooler-config --override-pooler-config", "the pooling of /v1/embeddings is set by "
         "--pooling."),
        ("--speculative-config --speculative-model --num-speculative-tokens", _SPECULATIVE),
        ("--ngram-prompt-lookup-max --ngram-prompt-lookup-min", _SPECULATIVE),
        ("--quantization-param-path --rope-scaling --rope-theta --hf-overrides",
         "config.json says it; change it there."),
        ("--hf-config-path --config-format", "config.json lies beside the weights; put it there."),
        ("--download-dir", "set HF_HOME, as for other programs of Hugging Face's."),
        ("--hf-token", "set HF_TOKEN, as for other programs of Hugging Face's."),
        ("--tokenizer-mode --skip-tokenizer-init --tokenizer-pool-size", "the tokenizer is "
         "transformers' fast one; leave it out."),
        ("--tokenizer-revision", "the checkpoint's tokenizer has its --revision, and of a hub id "
         "that --tokenizer names the main branch is taken; name a directory for another."),
        ("--model-loader-extra-config --ignore-patterns --use-tqdm-on-load", _SAFETENSORS),
        ("--safetensors-load-strategy --pt-load-map-location", _SAFETENSORS),
        ("--generation-config --override-generation-config", _GENERATION_CONFIG),
        ("--guided-decoding-backend --structured-outputs-config", _STRUCTURED),
        ("--scheduling-policy", _ORDER),
        ("--attention-backend --attention-config -ac --disable-cascade-attn", _KERNELS),
        ("--disable-sliding-window", "all models here attend to everything; leave it out."),
        ("--h11-max-incomplete-event-size --h11-max-header-count", _BOUNDS),
        ("--ssl-ca-certs --ssl-cert-reqs --ssl-ciphers --enable-ssl-refresh", _TLS),
        ("--otlp-traces-endpoint --collect-detailed-traces --cudagraph-metrics", _METRICS),
        ("--show-hidden-metrics-for-version --enable-server-load-tracking", _METRICS),
        ("--kv-events-config", "its fields are flags here: --kv-events-endpoint, "
         "--kv-events-replay-endpoint and --kv-events-topic."),
        ("--custom-histogram-buckets", "/metrics has vLLM's buckets and finer ones; leave it out."),
        ("--kv-cache-metrics --profiler-config --enable-mfu-metrics", _METRICS),
        ("--max-logprobs", "requests may ask for 20; leave it out."),
        ("--logprobs-mode", "log-probabilities are of the unmodified distribution; leave it out."),
        ("--stream-interval", "every step's tokens are sent at once; leave it out."),
        ("--enable-prompt-tokens-details", "the usage always tells of cached tokens; leave it "
         "out."),
        ("--return-tokens-as-token-ids", "a request asks for ids itself: return_token_ids."),
        ("--response-role", "answers have the role assistant; leave it out."),
        ("--chat-template-content-format", "it is read off the chat template; leave it out."),
        ("--default-chat-template-kwargs", "a request sets them itself: chat_template_kwargs."),
        ("--trust-request-chat-template", "templates come with the checkpoint, not with requests."),
        ("--config", "flags are given on the command line alone."),
        ("--v1 --use-v2-block-manager --disable-async-output-proc", "there is one engine; leave it "
         "out."),
        ("--ray-workers-use-nsight", _ONE_DEVICE),
        ("--quantization-config", _QUANTIZED),
    )
    for name in names.split()
}  # fmt: skip

_FAMILIES = (
    ("--data-parallel-", _ONE_DEVICE),
    ("--mm-", _TEXT_ONLY),
    ("--speculative-", _SPECULATIVE),
    ("--spec-decoding-", _SPECULATIVE),
    ("--mamba-", "models with state spaces are not supported; leave it out."),
)
"""Beginnings of names that whole families of flags share, and the reason for each family."""


def why_not_here(flag: str) -> str | None:
    """Return the reason why minisrv lacks a flag of vLLM, as text that follows the flag's name in a
    message; None for a flag that vLLM does not have.

    flag: the flag as it was typed, e.g. `--tensor_parallel_size`, `--no-enable-chunked-prefill`,
        `--compilation-config.level`.
    """
    name = flag.partition("=")[0].partition(".")[0].replace("_", "-")
    for spelling in (name, "--" + name.removeprefix("--no-")):
        if spelling in _REASONS:
            return _REASONS[spelling]
    return next((why for start, why in _FAMILIES if name.startswith(start)), None)


FLAGS = frozenset(_REASONS)
"""The flags of vLLM that are listed by their whole names, and not by how they begin."""
