"""The FastAPI application: its routes, and the answers of those that do not generate text.

Knows: FastAPI. An application is made from an engine client whose engine may still be loading; it
needs nothing else of the engine.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request
from msgspec.structs import asdict
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from minisrv.checkpoint import GenerationConfig
from minisrv.config import METRICS_NAMES, ServerConfig
from minisrv.engine.client import EngineClient, EngineState
from minisrv.engine.messages import (
    Sleep,
    SleepMode,
    SleepReport,
    SleepTag,
    WakeUp,
    sleep_level,
    sleep_word,
)
from minisrv.errors import EngineNotReadyError, RequestError, shown
from minisrv.metrics import CONTENT_TYPE, Metrics, MetricsNames
from minisrv.request import Pooling
from minisrv.server.anthropic_builder import MessageResponseBuilder
from minisrv.server.anthropic_requests import CountTokensRequest, MessagesRequest
from minisrv.server.anthropic_responses import MESSAGES, AnthropicMessage, MessageTokensCount
from minisrv.server.auth import OPEN_PATHS, ApiKeys, KeyLimit
from minisrv.server.embeddings import EmbeddingsResponse
from minisrv.server.errors import JSON, install_error_handlers
from minisrv.server.generation_response import GenerationResponse
from minisrv.server.hosts import HostNames
from minisrv.server.middleware import OuterMiddleware
from minisrv.server.offload import offload
from minisrv.server.openapi import (
    DocumentedApp,
    anthropic_responses_of,
    errors_only,
    health_responses,
    route_responses,
    trace_responses,
)
from minisrv.server.pages import UI_PATHS, add_pages
from minisrv.server.query import check_names, check_once
from minisrv.server.request_body import BodyRoute
from minisrv.server.request_schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from minisrv.server.response_builders import (
    ChatResponseBuilder,
    CompletionResponseBuilder,
    ResponseBuilder,
)
from minisrv.server.response_schemas import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    EmbeddingResponse,
    HealthResponse,
    LoadingProgress,
    LoadResponse,
    ModelCard,
    ModelList,
    ReadyResponse,
    ServingGeneration,
    ServingGraphs,
    SleepResponse,
    TokenizeResponse,
    TokenizerInfo,
    VersionResponse,
)
from minisrv.server.responses_objects import RESPONSES
from minisrv.server.responses_routes import Conversations, add_responses_routes
from minisrv.server.responses_store import ResponseStore
from minisrv.server.serving import Serving
from minisrv.server.step_trace import TraceQuery, TraceReaders, TraceResponse
from minisrv.text.tokenizer import Tokenizer

DEFAULT_MAX_BODY_BYTES = 4 << 20

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_EMBEDDINGS, _INVOCATIONS = "/v1/embeddings", "/invocations"
_TOKENIZE, _DETOKENIZE = "/tokenize", "/detokenize"
_COUNT_TOKENS = f"{MESSAGES}/count_tokens"
_SLEEP, _WAKE_UP = "/sleep", "/wake_up"
_STEPS = "/debug/steps"


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    *,
    served_model_names: tuple[str, ...],
    generation: GenerationConfig,
    root: str = "",
    metrics: Metrics | None = None,
    settings: ServerConfig | None = None,
    enable_sleep_mode: bool = False,
    key_limit: KeyLimit | None = None,
    max_open: int = sys.maxsize,
    hosts: HostNames | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    is_alone: bool = True,
) -> FastAPI:
    """Return the ASGI application of one API worker.

    served_model_names: the values that `model` may have; responses to requests without a model
        carry the first.
    generation: the checkpoint's sampling defaults.
    root: the checkpoint as the operator named it; if empty, the first of the served names.
    metrics: the counters of this worker; None makes new ones, for a worker that is alone.
    settings: the server's settings, such as API keys and timeouts; None takes the defaults, which
        ask for no key and set no time limit.
    enable_sleep_mode: whether clients may put the engine to sleep.
    key_limit: limits what each API key may have open; None sets no limit.
    max_open: maximum number of open choices of all keys together, where the engine would take more.
    hosts: the host names that the server answers to; None for any.
    is_alone: whether every request of a client comes to this application; only then can it store
        responses.

    Whoever serves the application calls its `state.close()` when there is no more time for
    requests.
    """
    metrics, settings = metrics or Metrics(), settings or ServerConfig()
    serving = Serving(
        client,
        tokenizer,
        served_model_names,
        generation,
        metrics,
        root=root or served_model_names[0],
        key_limit=key_limit,
        max_open=max_open,
        grammar_seconds_per_key=settings.max_grammar_seconds_per_key,
        share_prefix_cache=settings.share_prefix_cache,
        request_timeout=settings.request_timeout or None,
    )
    app = DocumentedApp(
        keyed=bool(settings.api_keys),
        title="minisrv",
        version=version("minisrv"),
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages load scripts from the internet
        redoc_url=None,
    )
    app.state.close = serving.close
    app.add_middleware(
        OuterMiddleware,
        root_path=settings.root_path,
        hosts=hosts or HostNames(),
        keys=ApiKeys(settings.api_keys, OPEN_PATHS | (UI_PATHS if settings.ui else frozenset())),
        max_body_bytes=max_body_bytes,
        json_paths=frozenset(
            {_COMPLETIONS, _CHAT, _EMBEDDINGS, _INVOCATIONS, RESPONSES}
            | {MESSAGES, _COUNT_TOKENS, _TOKENIZE, _DETOKENIZE}
        ),
        command_paths=frozenset({_SLEEP, _WAKE_UP} if enable_sleep_mode else ()),
        arrived=metrics.arrived,
        failed=metrics.failed,
        access_log=not settings.disable_uvicorn_access_log,
    )
    if settings.allowed_origins:
        # Outside the edge: a browser's preflight request comes without an API key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    install_error_handlers(app)
    _add_generation_routes(app, serving, settings)
    store = ResponseStore() if is_alone else None
    add_responses_routes(app, serving, Conversations(store, max_body_bytes))
    _add_tokenizer_routes(app, serving)
    _add_model_routes(app, serving)
    _add_operation_routes(
        app, client, metrics, served_model_names[0], MetricsNames(settings.metrics_names)
    )
    readers = TraceReaders(client, served_model_names[0], serving.request_timeout)
    _add_trace_route(app, readers)
    if enable_sleep_mode:
        _add_sleep_routes(app, client)
    add_pages(app, serving, keyed=bool(settings.api_keys), ui=settings.ui)
    return app


def _add_generation_routes(app: FastAPI, serving: Serving, settings: ServerConfig) -> None:
    router = APIRouter(route_class=BodyRoute)
    pooling, adds_usage = Pooling(settings.pooling), settings.enable_force_include_usage

    def respond(body: CompletionRequest | ChatCompletionRequest | EmbeddingRequest) -> Response:
        model, tokenizer = serving.model_name(body.model), serving.tokenizer
        if isinstance(body, EmbeddingRequest):
            return EmbeddingsResponse(serving, body, model, pooling)
        body = body.with_usage() if adds_usage else body
        builder: ResponseBuilder
        if isinstance(body, ChatCompletionRequest):
            builder = ChatResponseBuilder(body, model, tokenizer)
        else:
            builder = CompletionResponseBuilder(body, model, tokenizer)
        return GenerationResponse(serving, body, builder)

    @router.post(
        _COMPLETIONS,
        response_class=JSON,
        responses=route_responses(CompletionResponse, streams=True),
    )
    async def completions(body: CompletionRequest) -> Response:
        """Complete one or more prompts."""
        return respond(body)

    @router.post(
        _CHAT, response_class=JSON, responses=route_responses(ChatCompletionResponse, streams=True)
    )
    async def chat_completions(body: ChatCompletionRequest) -> Response:
        """Answer a chat."""
        return respond(body)

    @router.post(_EMBEDDINGS, response_class=JSON, responses=route_responses(EmbeddingResponse))
    async def embeddings(body: EmbeddingRequest) -> Response:
        """Return an embedding of each input: the model's hidden states, pooled and normalised."""
        return respond(body)

    @router.post(
        _INVOCATIONS,
        response_class=JSON,
        responses=route_responses(
            CompletionResponse, ChatCompletionResponse, EmbeddingResponse, streams=True
        ),
    )
    async def invocations(
        body: CompletionRequest | EmbeddingRequest | ChatCompletionRequest,
    ) -> Response:
        """Answer as the path for the body's `prompt`, `messages` or `input` does; for SageMaker."""
        return respond(body)

    @router.post(MESSAGES, response_class=JSON, responses=anthropic_responses_of(AnthropicMessage))
    async def messages(body: MessagesRequest) -> Response:
        """Answer a chat, as Anthropic's API does."""
        model = serving.model_name(body.model)
        chat = await offload(body.as_chat, body.num_bytes)
        return GenerationResponse(
            serving, chat, MessageResponseBuilder(chat, model, serving.tokenizer)
        )

    app.include_router(router)


def _add_tokenizer_routes(app: FastAPI, serving: Serving) -> None:
    router = APIRouter(route_class=BodyRoute)

    @router.post(_TOKENIZE, response_class=JSON, responses=route_responses(TokenizeResponse))
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the token ids of a prompt or a chat, as a generation would see them."""
        serving.model_name(body.model)
        tokens = await serving.tokenize(body, request.scope["key"])
        return await offload(lambda: JSON(tokens), body.num_bytes)

    @router.post(_DETOKENIZE, response_class=JSON, responses=route_responses(DetokenizeResponse))
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Return the text of token ids, special tokens included."""
        serving.model_name(body.model)
        prompt = await serving.detokenize(body, request.scope["key"])
        return await offload(lambda: JSON(prompt), body.num_bytes)

    @app.get("/tokenizer_info", response_class=JSON, responses=route_responses(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Return what clients may need to know of the tokenizer and the chat template."""
        tokenizer = serving.tokenizer
        return JSON(
            TokenizerInfo(
                vocab_size=tokenizer.vocab_size,
                special_token_ids=sorted(tokenizer.special_ids),
                eos_token_ids=list(serving.generation.eos_token_ids),
                chat_template=tokenizer.chat_template_source or None,
                chat_template_variables=sorted(tokenizer.chat_template_variables),
            )
        )

    @router.post(
        _COUNT_TOKENS, response_class=JSON, responses=anthropic_responses_of(MessageTokensCount)
    )
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        """Return the number of tokens of the prompt that the same message would have."""
        serving.model_name(body.model)
        chat = await offload(body.as_chat, body.num_bytes)
        return JSON(MessageTokensCount(await serving.count_tokens(chat, request.scope["key"])))

    app.include_router(router)


def _add_model_routes(app: FastAPI, serving: Serving) -> None:
    def card(name: str) -> ModelCard:
        info = serving.client.info
        return ModelCard(
            id=name,
            object="model",
            created=serving.created,
            owned_by="minisrv",
            root=serving.root,
            parent=None,
            max_model_len=None if info is None else info.max_model_len,
        )

    @app.get("/v1/models", response_class=JSON, responses=route_responses(ModelList))
    async def models() -> Response:
        """List the names under which the model is served."""
        data = [card(name) for name in serving.served_model_names]
        return JSON(ModelList(object="list", data=data))

    @app.get(
        "/v1/models/{model_id:path}", response_class=JSON, responses=route_responses(ModelCard)
    )
    async def model(model_id: str) -> Response:
        """Describe the model under one of its names; 404 for any other name."""
        return JSON(card(serving.model_name(model_id)))


def _add_operation_routes(
    app: FastAPI, client: EngineClient, metrics: Metrics, model_name: str, names: MetricsNames
) -> None:
    @app.get("/health", response_class=JSON, responses=health_responses(HealthResponse))
    async def health() -> Response:
        """Answer 200 as long as the engine process lives, also while it loads or drains; else
        503."""
        state = client.state
        return JSON(HealthResponse(state), status_code=503 if state is EngineState.DEAD else 200)

    @app.get("/ping", response_class=JSON, responses=health_responses(HealthResponse))
    @app.post("/ping", response_class=JSON, responses=health_responses(HealthResponse))
    async def ping() -> Response:
        """Answer as /health does; for SageMaker."""
        return await health()

    @app.get("/load", response_class=JSON, responses=route_responses(LoadResponse))
    async def load() -> Response:
        """Return the number of requests that run or wait in the engine."""
        stats = await client.stats()
        return JSON(LoadResponse(stats.running + stats.waiting))

    @app.get("/ready", response_class=JSON, responses=health_responses(ReadyResponse))
    async def ready() -> Response:
        """Answer 200 if the engine takes requests; else 503, with the progress while it loads."""
        state = client.state
        if state is EngineState.READY:
            assert client.info is not None, "a ready engine has described itself"
            report = client.info.compilation
            serving = ServingGeneration(report.state, report.generation, report.reason)
            ladder = client.info.ladder
            graphs = ServingGraphs(
                graphs=ladder.graphs,
                total=ladder.total,
                missing=ladder.missing,
                decode=ladder.decode,
                mixed=ladder.mixed,
                epilogues=ladder.epilogues,
                refused=ladder.refused,
                quarantined=ladder.quarantined,
                stopped=ladder.stopped,
            )
            return JSON(ReadyResponse(state, compilation=serving, graphs=graphs))
        headers = (
            {}
            if state is EngineState.DEAD
            else {"retry-after": str(EngineNotReadyError.retry_after)}
        )
        loading = None
        if state is EngineState.LOADING:
            loading = LoadingProgress(**asdict(client.loading))
        return JSON(ReadyResponse(state, loading), status_code=503, headers=headers)

    @app.get("/version", response_class=JSON, responses=route_responses(VersionResponse))
    async def show_version() -> Response:
        """Return the version of minisrv."""
        return JSON(VersionResponse(app.version))

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors_only())
    async def scrape(
        wanted: Annotated[
            str | None,
            Query(alias="names", description="minisrv, vllm or both, in place of --metrics-names"),
        ] = None,
    ) -> Response:
        """Return the metrics in Prometheus' text format, under the names that the server was
        started with, or those that `names` asks for."""
        if wanted is not None and wanted not in METRICS_NAMES:
            allowed = ", ".join(METRICS_NAMES)
            wrong = f"names must be one of {allowed}, not {shown(wanted)}."
            raise RequestError(wrong, param="names")
        text = metrics.render(
            await client.stats(),
            client.info,
            client.state.value,
            [state.value for state in EngineState],
            model_name=model_name,
            names=names if wanted is None else MetricsNames(wanted),
        )
        return Response(text, media_type=CONTENT_TYPE)


def _add_trace_route(app: FastAPI, readers: TraceReaders) -> None:
    @app.get(_STEPS, response_class=Response, responses=trace_responses())
    async def steps(
        request: Request,
        since: Annotated[str | None, Query(description="id of the last step that is known")] = None,
        limit: Annotated[str | None, Query(description="maximum number of steps")] = None,
        follow: Annotated[str, Query(description="true or false")] = "false",
    ) -> Response:
        """Return the last steps of the engine as lines of JSON: behind a header those after
        `since`, or the last `limit` ones. With `follow` the response goes on as steps come."""
        check_names(request, "since", "limit", "follow")
        check_once(request, "since", "limit", "follow")
        if follow not in ("true", "false"):
            wrong = f"follow must be true or false, not {shown(follow)}."
            raise RequestError(wrong, param="follow")
        query = TraceQuery(
            since=_step_number("since", since),
            limit=_step_number("limit", limit),
            follow=follow == "true",
        )
        readers.info()
        return TraceResponse(readers, query)


def _step_number(name: str, text: str | None) -> int | None:
    """Return the number that a parameter of the query string holds, or None if it is not given.
    Raises RequestError."""
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,15}", text):
        raise RequestError(f"{name} must be an integer from 0, not {shown(text)}.", param=name)
    return int(text)


def _add_sleep_routes(app: FastAPI, client: EngineClient) -> None:
    def answer(report: SleepReport) -> Response:
        tags = [tag.value for tag in report.released]
        return JSON(SleepResponse(report.is_asleep, report.level, tags))

    @app.post(_SLEEP, response_class=JSON, responses=route_responses(SleepResponse))
    async def sleep(
        request: Request,
        level: Annotated[str, Query(description="1 or 2")] = "1",
        mode: Annotated[str, Query(description="abort or wait")] = SleepMode.ABORT.value,
    ) -> Response:
        """Release the memory of weights and KV cache. Level 1 keeps the weights in the memory of
        the host, level 2 reads them from the checkpoint at the next wake-up. Requests end with an
        error (abort), or are waited for (wait); new ones are refused."""
        check_names(request, "level", "mode")
        check_once(request, "level", "mode")
        asked = sleep_word(SleepMode, mode, "mode")
        return answer(await client.command(Sleep(sleep_level(level), asked)))

    @app.post(_WAKE_UP, response_class=JSON, responses=route_responses(SleepResponse))
    async def wake_up(
        request: Request,
        tags: Annotated[
            list[str] | None, Query(description="weights, kv_cache; both if none")
        ] = None,
    ) -> Response:
        """Restore the memory, or that of the tags; requests are served when all is restored."""
        check_names(request, "tags")
        asked = [sleep_word(SleepTag, tag, "tags") for tag in tags or SleepTag]
        return answer(await client.command(WakeUp(asked)))

    @app.get("/is_sleeping", response_class=JSON, responses=route_responses(SleepResponse))
    async def is_sleeping() -> Response:
        """Return whether the engine sleeps."""
        return answer((await client.stats()).sleep)
