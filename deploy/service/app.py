"""The routes: a picture in; its pooled feature, a similarity or a picture of its dense features out."""

import asyncio
import contextlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from fastapi import FastAPI, Request, Response
from guard import Guard, Metrics
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from worker import Worker

from ppdensecl import __version__
from ppdensecl.data.picture import UndecodableError, decode
from ppdensecl.visual.pca import Colours

PATHS = ("/features", "/similarity", "/dense", "/health", "/metrics")
_BINARY = {"type": "string", "format": "binary"}
_PICTURE = {"requestBody": {"required": True, "content": {"image/*": {"schema": _BINARY}}}}
_TWO_PICTURES = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["a", "b"], "properties": {"a": _BINARY, "b": _BINARY}}}}}}


def make(model, engine, threads, batch_size, queue, max_bytes, timeout):
    """The application as ASGI. Arguments: an export, its engine, decoding threads, and the limits of Worker and Guard."""
    metrics = Metrics()
    worker = Worker(engine, model, batch_size, metrics.batch_done)
    decoders = ThreadPoolExecutor(threads)

    @contextlib.asynccontextmanager
    async def running(_):
        yield
        worker.stop()
        decoders.shutdown()

    app = FastAPI(title="ppdensecl", version=__version__, lifespan=running)

    def in_thread(function, *arguments):
        return asyncio.get_running_loop().run_in_executor(decoders, function, *arguments)

    async def computed(data, name):
        """The outputs for a picture's bytes. Raises HTTPException."""
        try:
            view = await in_thread(lambda: model.seen(decode(data, name)))
        except UndecodableError as error:
            raise HTTPException(422, str(error)) from None
        return await worker.outputs(view)

    @app.exception_handler(HTTPException)
    async def refused(_, error):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.post("/features", openapi_extra=_PICTURE, summary="The pooled feature of the picture that is the body")
    async def features(request: Request):
        outputs = await computed(await request.body(), "body")
        return {"pooled": outputs["pooled"].tolist()}

    @app.post("/similarity", openapi_extra=_TWO_PICTURES, summary="The cosine of the pooled features of two pictures")
    async def similarity(request: Request):
        async with request.form(max_files=2, max_fields=0) as form:
            missing = [name for name in ("a", "b") if not isinstance(form.get(name), UploadFile)]
            if missing:
                raise HTTPException(422, f"there is no file '{missing[0]}'; send two pictures as multipart/form-data: a and b")
            data = [await form[name].read() for name in ("a", "b")]
        a, b = (outputs["pooled"] for outputs in await asyncio.gather(*map(computed, data, ("a", "b"))))
        return {"cosine": float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))}

    @app.post("/dense", openapi_extra=_PICTURE, response_class=Response, summary="A PNG of the view's size: dense features as colours")
    async def dense(request: Request):
        outputs = await computed(await request.body(), "body")
        return Response(await in_thread(_drawn, outputs[model.maps[-1]], model.size), media_type="image/png")

    @app.get("/health", summary="Ready as soon as it answers")
    async def health():
        return {"status": "ready", "model": model.title, "view": list(model.size), "engine": engine.title}

    @app.get("/metrics", response_class=Response, summary="For Prometheus")
    async def shown_metrics():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return Guard(app, metrics, PATHS, queue, max_bytes, timeout)


def _drawn(feature_map, size):
    file = io.BytesIO()
    Image.fromarray(Colours(feature_map[None]).picture(feature_map, size)).save(file, "PNG")
    return file.getvalue()
