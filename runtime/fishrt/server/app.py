"""The application: all routes over one `Service`, with errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ..errors import FishrtError
from ..tts import TTS
from ..version import __version__
from . import docs, health, page
from .diffusion import echo
from .edge import Edge
from .problems import GONE, GoneError, problem, reply
from .service import Service
from .settings import Settings
from .speech import live, native, openai
from .speech.wyoming import serving
from .voices import routes as voices
from .voices import stored

_EXPOSED = "X-Seed X-Queue-Time X-Request-Id X-Ignored-Parameters X-Warnings".split()
_EXPOSED += "X-Audio-Sample-Rate X-Audio-Channels X-Audio-Encoding".split()


def create_app(tts: TTS, settings: Settings, *, closing: bool = True, wyoming: socket.socket | None = None) -> FastAPI:
    """Return the ASGI application that speaks with `tts`; `app.state.service` is its `Service`.

    It refuses requests until its lifespan has begun and the model has spoken once. closing: the end of its lifespan closes `tts`.
    wyoming: a listening socket on which it speaks Wyoming's protocol, too.
    """
    service = Service(tts, settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())
        async with serving(service, wyoming) if wyoming else nullcontext():
            yield
            service.drain()
        loading.cancel()
        await asyncio.to_thread(service.close)
        if closing:
            tts.close()

    app = FastAPI(
        title="fishrt",
        version=__version__,
        summary="Text to speech",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    routers = [part.routes(service) for part in (openai, native, echo, stored, live, voices, health)]
    routers += [page.routes(), docs.routes(app)]
    for router in routers:
        app.include_router(router)
    every = [route for router in routers for route in router.routes]
    app.openapi = lambda: docs.describe(app, every)  # type: ignore[method-assign]
    for kind in (HTTPException, RequestValidationError, FishrtError, GoneError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(Edge, service=service, paths=frozenset(getattr(route, "path", "") for route in every))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    return app


async def _answer(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE) if isinstance(error, GoneError) else reply(problem(error), request.scope)
