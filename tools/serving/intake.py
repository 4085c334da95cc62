"""From a request to an image: its body with limits on bytes and time, its pixels with a limit on their number."""

import asyncio
import io

from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive
from torch import Tensor

from detr.errors import UserError
from detr.images import DAMAGE, FORMATS, check_pixels, upright_tensor

FIELD = "image"  # of a form
_HOW = f"Send the image as the body with its type, such as image/jpeg, or in the field {FIELD} of a multipart form"
_FIELDS = 10  # of a form that are read, for other fields than the image


async def receive_image(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The image file that a request sends, as its body or in a form.

    Raises HTTPException: 400 for an empty body or a wrong form, 408 where it takes longer, 413 where it is larger, 415
    for another type.
    """
    too_large = HTTPException(413, f"The request has more than the {max_bytes} bytes that are taken.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    limited = Request(request.scope, _limited(request.receive, max_bytes, too_large))
    try:
        content = await asyncio.wait_for(_read(limited), seconds)
    except asyncio.TimeoutError:
        raise HTTPException(
            408, f"The request did not arrive within {seconds:g} seconds.", headers={"Connection": "close"}
        ) from None
    if not content:
        raise HTTPException(400, f"The request holds no image. {_HOW}.")
    return content


def _limited(receive: Receive, max_bytes: int, too_large: HTTPException) -> Receive:
    """Counts what arrives: a length need not be declared."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise too_large
        return message

    return limited


async def _read(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=1, max_fields=_FIELDS) as form:
                file = form.get(FIELD)
                if not isinstance(file, UploadFile):
                    raise HTTPException(400, f"The form has no file in its field {FIELD}. {_HOW}.")
                return await file.read()
        except FormParserError:  # which older versions of starlette let through
            raise HTTPException(400, "Invalid multipart data.") from None
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(415, f"The type of the request is no image's. {_HOW}.")
    return await request.body()


def decode_image(content: bytes, max_pixels: int) -> UInt8[Tensor, "3 height width"]:
    """The image in the content of a file, as `detr.images.read_image` reads the file.

    Raises HTTPException: 413 for more pixels, 415 where it is no raster image, 422 where it is damaged.
    """
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=sorted(FORMATS & Image.OPEN.keys())) as image:
            check_pixels(image, max_pixels)
            return upright_tensor(image)
    except Image.DecompressionBombError:
        raise HTTPException(413, f"The image has more than the {max_pixels} pixels that are taken.") from None
    except UnidentifiedImageError:
        raise HTTPException(415, "The request holds no image that can be read, such as JPEG, PNG or WebP.") from None
    except UserError as error:
        raise HTTPException(422, str(error)) from None
    except DAMAGE as error:
        raise HTTPException(422, f"The image is damaged or cut short: {str(error).rstrip('.')}.") from None
