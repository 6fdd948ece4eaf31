"""A chat model behind an OpenAI-compatible server: endpoint, model and key from the environment."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from switchkd.errors import UserError

#: Environment variables, the first two as OpenAI's own client reads them.
BASE_URL, API_KEY, MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"
#: Answers after which the same request may succeed: time-outs, too many requests, a server in trouble.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
#: No wait between two attempts is longer, seconds, whatever the server asks for.
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Reply:
    """What a server answered to one request.

    Attributes:
        text: Of the first choice.
        prompt_tokens: As the server counts, 0 where it does not.
        completion_tokens: Likewise.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever a server points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatServer:
    """A chat model of an OpenAI-compatible server.

    Attributes:
        base_url: What `/chat/completions` is added to, such as http://localhost:8000/v1.
        model: Its name there.
        key: Sent as a bearer token; empty where the server needs none. It stands in no message and no `repr`.
        timeout: Seconds without an answer before a request is given up.
        max_retries: Repetitions of a request that failed for a passing reason.
        request_options: More of the request, such as `{"temperature": 0}`.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    max_retries: int = 5
    request_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **options: Any) -> "ChatServer":
        """Return the server that the environment names.

        Args:
            environment: Such as `os.environ`.
            options: `timeout`, `max_retries` and `request_options`.

        Raises:
            UserError: A variable is missing, or the address is none, or holds a password.
        """
        base_url, model = environment.get(BASE_URL, "").strip(), environment.get(MODEL, "").strip()
        if not base_url:
            raise UserError(f"set {BASE_URL} to the address of an OpenAI-compatible server, http://localhost:8000/v1")
        if not model:
            raise UserError(f"set {MODEL} to the name of the model that {BASE_URL} serves")
        try:
            parts = urlsplit(base_url)
            address, _ = parts.hostname, parts.port
        except ValueError:
            address = None
        if address is None or parts.scheme not in ("http", "https"):
            raise UserError(f"{BASE_URL} must be an http or https address, such as http://localhost:8000/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise UserError(f"{BASE_URL}: give the address alone, and a key in {API_KEY}")
        key = environment.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{API_KEY} holds characters that no header can carry")
        return cls(base_url.rstrip("/"), model, key, **options)

    def complete(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """Return the model's answer to some messages; safe to call from several threads.

        Args:
            messages: `{"role": ..., "content": ...}` each.

        Raises:
            UserError: The server cannot be reached, refuses the request, or answers with something else.
        """
        options = {name: value for name, value in self.request_options.items() if value is not None}
        body = json.dumps({"model": self.model, "messages": list(messages), **options}).encode()
        wait = 1.0
        for attempt in range(self.max_retries + 1):
            try:
                return self._reply(self._post(body))
            except urllib.error.HTTPError as error:
                said = self._said(error)
                if error.code not in PASSING or attempt == self.max_retries:
                    raise UserError(self._refusal(error.code, said, attempt)) from None
                pause = _retry_after(error.headers)
            except (TimeoutError, urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
                reason = getattr(error, "reason", error)
                passing = isinstance(reason, TimeoutError | ConnectionResetError | http.client.HTTPException)
                if not passing or attempt == self.max_retries:
                    raise UserError(self._unreachable(reason, attempt)) from None
                pause = None
            time.sleep(min(wait if pause is None else pause, LONGEST_WAIT))
            wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "switchkd"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.base_url}/chat/completions", body, headers, method="POST")
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout) as answer:
            data: bytes = answer.read()
        return data

    def _reply(self, data: bytes) -> Reply:
        try:
            content = json.loads(data)
            message = content["choices"][0]["message"]
            text, usage = message.get("content") or "", content.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            head = self._clean(data.decode("utf-8", "replace"))
            raise UserError(
                f"{self.base_url} answered with something that is no chat completion: {head!r}; is it the address of "
                "an OpenAI-compatible server, with /v1?"
            ) from None
        return Reply(self._without_key(text), *counts)

    def _refusal(self, code: int, said: str, attempt: int) -> str:
        hint = {
            401: f"; check {API_KEY}" if self.key else f"; set {API_KEY}",
            403: f"; check {API_KEY}",
            404: f"; check {BASE_URL} (with /v1?) and {MODEL}={self.model}",
            429: "; fewer requests at once (--concurrency) or more --max_retries may help",
        }.get(code, "")
        if 300 <= code < 400:
            hint = f"; redirects are not followed, so that the key goes nowhere else: give their address in {BASE_URL}"
        tries = f" {attempt + 1} times" if attempt else ""
        return f"{self.base_url} refused the request{tries} with status {code}{f' ({said})' if said else ''}{hint}"

    def _unreachable(self, reason: Any, attempt: int) -> str:
        tries = f" ({attempt + 1} attempts)" if attempt else ""
        if isinstance(reason, TimeoutError):
            return f"{self.base_url} did not answer within {self.timeout:g} s{tries}; a longer --timeout may help"
        said = self._clean(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__)
        return f"{self.base_url} cannot be reached{tries}: {said}; check {BASE_URL}"

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The message of a refusal, in one line."""
        try:
            text = error.read(10_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        try:
            content = json.loads(text)
            found = content.get("error", content) if isinstance(content, dict) else content
            text = str(found.get("message", found)) if isinstance(found, dict) else str(found)
        except ValueError:
            pass
        return self._clean(text)

    def _clean(self, text: str) -> str:
        return " ".join(self._without_key(text).split())[:200]

    def _without_key(self, text: str) -> str:
        """A server may repeat the key in what it says."""
        return text.replace(self.key, "***") if self.key else text


def _retry_after(headers: Message) -> float | None:
    """Seconds that a server asks to wait, None where it does not say."""
    try:
        return max(float(headers.get("Retry-After", "")), 0.0)
    except ValueError:
        return None
