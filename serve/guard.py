"""What stands before every route: one error shape, API keys, the body limit. Pure ASGI, knows no model."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from tdro_ray.errors import ConfigError

KEYS_VARIABLE = "TDRO_API_KEYS"  # comma separated
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})  # need no key; none gives data away

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger(__name__)


class RequestError(HTTPException):
    """An answer that is not a success: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        # An HTTPException, because FastAPI turns any other error raised while it reads a body into a 400.
        super().__init__(status, message, headers or {})
        self.code, self.message = code, message

    def body(self) -> bytes:
        """The JSON body. ASCII only: a message may quote text that cannot be written as UTF-8."""
        return json.dumps({"error": {"code": self.code, "message": self.message[:2000]}}).encode("ascii")


def parse_keys(text: str) -> tuple[str, ...]:
    """Return the SHA-256 digests of comma-separated API keys. Raises ConfigError for keys that are too short."""
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if any(len(key) < 16 for key in keys):
        raise ConfigError(
            f"A key in {KEYS_VARIABLE} is shorter than 16 characters; make one with `openssl rand -hex 24`."
        )
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def check_binding(host: str, keys: Iterable[str]) -> None:
    """Raise ConfigError when a server without API keys would listen on an address that other machines reach."""
    if any(True for _ in keys) or is_loopback(host):
        return
    raise ConfigError(
        f"Serving on {host!r} without API keys would open the model and the documents to everybody who reaches this machine. "
        f"Set the environment variable {KEYS_VARIABLE} (several keys separated by commas), or serve on 127.0.0.1."
    )


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """ASGI middleware: refuses without a key or beyond the body limit, and turns what slips through into a JSON 500."""

    def __init__(self, app: Any, key_digests: tuple[str, ...], max_body_bytes: int) -> None:
        self.app, self.key_digests, self.max_body_bytes = app, key_digests, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check_key(scope["path"].removeprefix(scope.get("root_path", "")), headers)
            self._check_length(headers)
            await self.app(scope, self._limited(receive), watched_send)
        except RequestError as err:
            if started:
                raise
            await send_error(err, send)
        except Exception:
            log.exception("Request to %r failed", scope["path"])
            if started:
                raise
            await send_error(
                RequestError(500, "internal", "The server failed on this request; its log says why."), send
            )

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self.key_digests or path in OPEN_PATHS:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
        digest = hashlib.sha256(given).hexdigest()
        # Digests are compared, all of them, so that time tells neither a key's beginning nor its place.
        if not sum(hmac.compare_digest(digest, known) for known in self.key_digests):
            what = "No API key was given" if not given else "The API key is not valid"
            raise RequestError(
                401,
                "unauthorized",
                f"{what}; send the header `Authorization: Bearer <key>`.",
                {"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(
            413, "body_too_large", f"The request body is larger than {self.max_body_bytes} bytes; send fewer texts per request.",
            {"Connection": "close"},
        )  # fmt: skip

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:  # a chunked body announces no length
                raise self._too_large()
            return message

        return limited


async def send_error(error: RequestError, send: Send) -> None:
    """Send an error as a complete ASGI response."""
    body = error.body()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(error.headers or {})}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})
