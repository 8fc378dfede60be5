"""How much the server takes: rates, places and their queue, settings."""
import asyncio

import pytest

from serve_limits import Places, Rates, Refused, ServeConfig


def test_rates_refill_and_forget():
    now = [0.0]
    rates = Rates(60, most=3, clock=lambda: now[0])
    for _ in range(10):
        rates.take("a")
    with pytest.raises(Refused) as error:
        rates.take("a")
    assert error.value.status == 429 and error.value.retry_after == 1
    now[0] += 1.5
    rates.take("a")
    for other in "bcdef":
        rates.take(other)
    assert len(rates._buckets) == 3


def run_places(test, **settings):
    async def main():
        await test(Places(ServeConfig(**settings)))
    asyncio.run(main())


def test_places_are_given_in_order_and_the_queue_is_bounded():
    async def test(places):
        got = []

        async def ask(name):
            await places.enter(name)
            got.append(name)
        await ask("a")
        tasks = [asyncio.create_task(ask(name)) for name in "bc"]
        await asyncio.sleep(0)
        assert places.waiting == 2
        with pytest.raises(Refused) as error:
            await places.enter("d")
        assert error.value.status == 503 and error.value.retry_after
        for name in "ab":
            places.leave(name)
            await asyncio.sleep(0.01)
        assert got == ["a", "b", "c"] and places.taken == 1
        places.leave("c")
        await asyncio.gather(*tasks)
        assert places.taken == places.waiting == 0 and not places._clients
    run_places(test, max_sessions=1, queue=2)


def test_who_waits_too_long_or_leaves_holds_no_place():
    async def test(places):
        await places.enter("a")
        with pytest.raises(Refused) as error:
            await places.enter("b")
        assert error.value.code == "full"
        task = asyncio.create_task(places.enter("c"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        places.leave("a")
        assert places.taken == places.waiting == 0 and not places._clients
        await places.enter("d")
    run_places(test, max_sessions=1, queue=2, queue_seconds=0.05)


def test_one_client_gets_its_share_and_a_closing_server_lets_nobody_in():
    async def test(places):
        await places.enter("a")
        await places.enter("a")
        with pytest.raises(Refused) as error:
            await places.enter("a")
        assert error.value.status == 429
        await places.enter("b")
        places.closing = True
        with pytest.raises(Refused) as error:
            await places.enter("c")
        assert error.value.code == "closing"
    run_places(test, max_sessions=4, per_client=2)


def test_settings_name_their_flag():
    for bad, flag in (({"port": 70_000}, "--port"), ({"max_sessions": 0}, "--max_sessions"), ({"max_body_mb": 0}, "--max_body_mb"), ({"max_text": 0}, "--max_text"), ({"grace_seconds": -1}, "--grace_seconds")):
        with pytest.raises(ValueError, match=flag):
            ServeConfig(**bad)
