"""Health, whether the next request would be served; and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..version import __version__
from .service import Service

_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready; `reason` says why."}}


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["Operation"])

    @router.get("/health", summary="Health", responses=_NOT_READY)
    @router.head("/health", include_in_schema=False)
    @router.get("/v1/health", summary="Health, for Fish Speech's clients", responses=_NOT_READY)
    @router.post("/v1/health", summary="Health, for Fish Speech's clients", responses=_NOT_READY)
    @router.head("/v1/health", include_in_schema=False)
    async def health() -> Response:
        """Answer 200 if the next request would be served, else 503 with the reason."""
        fault = service.fault
        facts: dict[str, Any] = {"status": "failing" if fault and service.state == "ok" else service.state}
        if fault:
            facts["reason"] = fault
        facts |= {"model": service.tts.bundle.manifest.name, "version": __version__, "provider": service.provider}
        facts["needs_key"] = service.settings.api_key is not None
        facts["queue"] = service.queue()
        return JSONResponse(facts, 503 if fault else 200)

    @router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counts and times in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
