"""The HTTP application: whose routes there are, and how errors look. What a route does is in its router.

    POST /generate ...            native.py
    GET /health, /server_info ... control.py
    /v1/...                       openai/ (OpenAI's shapes)
    around all of them            security.py: keys, origins, the size of a body

SGLang: srt/entrypoints/http_server.py, one file of about 2,000 lines.
"""

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from ch07_sglang_radix.serving.control import control_router
from ch07_sglang_radix.serving.exposition import metrics_router
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.metrics import Metrics
from ch07_sglang_radix.serving.native import native_router
from ch07_sglang_radix.serving.openai.routes import openai_router
from ch07_sglang_radix.serving.responses import CLIENT_HAS_GONE, ClientHasGone, as_json
from ch07_sglang_radix.serving.security import guarded
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from ch07_sglang_radix.serving.weights import weights_router
from ch07_sglang_radix.serving.xray.mount import mount_page


def make_app(manager: TokenizerManager) -> FastAPI:
    # no page that loads scripts from another host: /openapi.json is there, /docs is not
    app = FastAPI(title="ch07_sglang_radix", docs_url=None, redoc_url=None)
    app.state.manager = manager
    app.include_router(native_router(manager))
    app.include_router(control_router(manager))
    app.include_router(weights_router(manager))
    app.include_router(openai_router(manager))
    if manager.args.enable_metrics:
        app.include_router(metrics_router(Metrics.of(manager)))
    mount_page(app, manager)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return as_json({"error": {"message": error.message}}, error.status)

    @app.exception_handler(ClientHasGone)
    async def gone(request: Request, error: ClientHasGone) -> Response:
        return Response(status_code=CLIENT_HAS_GONE)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return as_json({"error": {"message": error.detail}}, error.status_code)

    guarded(app, manager.args)
    return app
