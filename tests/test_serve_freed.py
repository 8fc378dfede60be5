"""What ended badly at the server is freed at once: sockets and bodies full of nonsense, against a server in this process."""
import asyncio
import gc
import threading
from types import SimpleNamespace

import pytest
from test_serve import Says, lab, wait_until, weights                         # noqa: F401     two of them are fixtures

import benchmark_serve
import serve
from config import EndpointConfig, LiveConfig
from live import LiveConversation
from serve_limits import ServeConfig

pytest.importorskip("websockets")


@pytest.fixture
def address(lab):                                                             # noqa: F811
    """(host, port) of a server in a thread of this process, as uvicorn runs it."""
    from serve_app import make_app
    from service import Service
    cfg = ServeConfig(port=0, requests_per_minute=1_000_000, per_client=1000)
    service = Service(lab, Says(), cfg, LiveConfig(user_sound=False), EndpointConfig(), transcribe=lambda audio, rate: "words")
    server = serve.make_server(make_app(service, ""), cfg)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield "127.0.0.1", server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(30)
    service.close()


def test_nonsense_leaves_nothing_for_the_collector(address):
    """Broken sockets, and bodies that are no JSON: nothing of them may wait until the collector of cycles comes by."""
    import requests
    from fastapi import Request
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    from serve_socket import Connection
    server = SimpleNamespace(host=address[0], port=address[1], url=f"http://{address[0]}:{address[1]}")

    def alive():
        return {kind.__name__: sum(type(o) is kind for o in gc.get_objects()) for kind in (LiveConversation, Connection, WebSocketsSansIOProtocol, Request)}
    gc.collect()
    before, tally, session = alive(), benchmark_serve.Tally(), requests.Session()
    gc.disable()
    try:
        asyncio.run(benchmark_serve.fuzz_frames(server, tally, 900, 0))
        for _ in range(5):
            benchmark_serve.ask(session, tally, "json", "POST", server.url + "/generate", data=b'{"text": ', headers={"content-type": "application/json"})
            benchmark_serve.ask(session, tally, "json", "POST", server.url + "/generate", data=b'{"text": "\xff"}', headers={"content-type": "application/json"})
        wait_until(lambda: alive() == before)
    finally:
        gc.enable()
    assert sum(n for code, n in tally.counts["frames"].items() if code != "frames sent") > 30 and not tally.hangs and not tally.failed
    assert set(tally.counts["json"]) == {"400", "422"}
