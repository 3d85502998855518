"""A server without the extra ``web``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from els_service.config import Settings
from els_service.errors import LoadError
from els_service.server.preflight import check_settings
from els_service.server.server import Server


@pytest.mark.parametrize("start", [Server, check_settings])
@pytest.mark.parametrize("module", ["httptools", "orjson", "starlette"])
def test_an_http_port_without_the_extra_is_rejected_and_the_message_names_it(
    monkeypatch: pytest.MonkeyPatch, module: str, start: Callable[[Settings], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoadError, match=r"http_port: .* pip install 'els-denoise\[web\]'"):
        start(Settings(http_port=8080))


def test_the_http_port_is_none_of_the_other_ports() -> None:
    with pytest.raises(LoadError, match="http_port: expected another port than port"):
        check_settings(Settings(http_port=50051))
