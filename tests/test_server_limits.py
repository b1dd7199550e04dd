"""Limits of a key: requests and tokens by the minute, requests at once, and the bill at the end."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.accounts import Accounts
from server.errors import CLIENT_GONE, ApiError
from server.keys import hash_key, write_keys
from server.limits import Bucket, Limits
from server.schemas_keys import KeyRecord
from server.settings import Settings
from server.usage import MAX_ROWS, OTHER, Usage


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def record(name="alice", key="key", **values):
    return KeyRecord(name=name, sha256=hash_key(key), **values)


@pytest.fixture
def opened(tmp_path):
    """Accounts of some records, with their clock."""

    def open_accounts(*records):
        clock = Clock()
        write_keys(tmp_path / "keys", records)
        return Accounts(Settings(keys_file=tmp_path / "keys"), clock), clock

    return open_accounts


def refused(action, *arguments):
    with pytest.raises(ApiError) as caught:
        action(*arguments)
    return caught.value


def test_a_bucket_fills_within_a_minute():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.add(-60)
    assert bucket.wait_s(30) == 30
    clock.now_s = 30
    assert (bucket.wait_s(30), bucket.level()) == (0, 30)
    clock.now_s = 1000
    assert bucket.level() == 60
    bucket.add(5)
    assert bucket.level() == 60


STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=30)


@given(st.integers(1, 50), STEPS)
def test_no_minute_gives_more_than_twice_the_limit(size, steps):
    clock, taken = Clock(), []
    bucket = Bucket(size, clock)
    for pause_s, amount in steps:
        clock.now_s += pause_s
        if bucket.wait_s(amount) == 0:
            bucket.add(-amount)
            taken.append((clock.now_s, amount))
        elif amount <= size:
            assert 0 < bucket.wait_s(amount) <= 60 + 1e-6
    for start_s, _ in taken:  # what was saved up, and what came since
        within = sum(amount for at_s, amount in taken if start_s <= at_s <= start_s + 60)
        assert within <= 2 * size + 1e-6


def test_requests_by_the_minute(opened):
    accounts, clock = opened(record(requests_per_minute=2))
    for _ in range(2):
        caller = accounts.identify("key")
        caller.enter()
        caller.leave(200)
    error = refused(accounts.identify("key").enter)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert (error.headers["retry-after"], error.headers["retry-after-ms"]) == ("30", "30000")
    clock.now_s = 30.001
    accounts.identify("key").enter()


def test_requests_at_once(opened):
    accounts, _ = opened(record(max_concurrent=1), record("bob", "other"))
    first = accounts.identify("key")
    first.enter()
    error = refused(accounts.identify("key").enter)
    assert (error.status, error.code, error.headers["retry-after"]) == (
        429,
        "rate_limit_exceeded",
        "1",
    )
    accounts.identify("other").enter()  # has limits of its own: none
    first.leave(200)
    accounts.identify("key").enter()


def test_tokens_are_reserved_and_settled(opened):
    accounts, clock = opened(record(tokens_per_minute=100))
    caller = accounts.identify("key")
    caller.enter()
    bill = caller.reserve(10, 80, "law")
    assert caller.headers()["x-ratelimit-remaining-tokens"] == "10"
    error = refused(accounts.identify("key").reserve, 10, 20)
    assert (error.status, error.code, error.headers["retry-after"]) == (
        429,
        "rate_limit_exceeded",
        "12",
    )
    bill.generated += 5
    caller.leave(200)
    assert caller.headers()["x-ratelimit-remaining-tokens"] == "85"
    (row,) = accounts.usage.report()["data"]
    assert row == {
        "key": "alice",
        "adapter": "law",
        "requests": 1,
        "prompt_tokens": 10,
        "completion_tokens": 5,
    }


def test_more_tokens_than_there_ever_are(opened):
    accounts, _ = opened(record(tokens_per_minute=100))
    error = refused(accounts.identify("key").reserve, 50, 51)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.headers == {"x-should-retry": "false"}
    assert "needs 101" not in str(error)
    assert "may need 101 tokens" in str(error)


@pytest.mark.parametrize(
    ("status", "generated", "remaining", "num_rows"),
    [
        (500, 0, 100, 0),  # nothing was done
        (429, 0, 100, 0),  # the engine's queue is full
        (500, 7, 83, 1),
        (CLIENT_GONE, 0, 90, 1),  # the prompt was read for it, or will have been
        (CLIENT_GONE, 7, 83, 1),
        (200, 0, 90, 1),
    ],
)
def test_the_bill_of_a_request_that_fails(opened, status, generated, remaining, num_rows):
    accounts, _ = opened(record(tokens_per_minute=100))
    caller = accounts.identify("key")
    caller.enter()
    caller.reserve(10, 80).generated = generated
    caller.leave(status)
    assert caller.headers()["x-ratelimit-remaining-tokens"] == str(remaining)
    assert len(accounts.usage.report()["data"]) == num_rows


@pytest.mark.parametrize(
    ("status", "generated", "remaining", "completion_tokens"),
    [(CLIENT_GONE, 7, 81, [9]), (CLIENT_GONE, 0, 88, [2]), (500, 0, 100, [])],
)
def test_tokens_that_come_after_the_end_are_charged_unless_all_was_free(
    opened, status, generated, remaining, completion_tokens
):
    accounts, _ = opened(record(tokens_per_minute=100))
    caller = accounts.identify("key")
    caller.enter()
    bill = caller.reserve(10, 80)
    bill.add(generated)
    caller.leave(status)
    bill.add(2)
    assert caller.headers()["x-ratelimit-remaining-tokens"] == str(remaining)
    rows = accounts.usage.report()["data"]
    assert [row["completion_tokens"] for row in rows] == completion_tokens
    assert [row["requests"] for row in rows] == [1 for _ in completion_tokens]


def test_headers_tell_what_is_limited(opened):
    accounts, clock = opened(record(requests_per_minute=60, tokens_per_minute=120))
    caller = accounts.identify("key")
    caller.enter()
    caller.reserve(20, 40)
    assert caller.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "120",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "30.000s",
    }


def test_new_limits_of_a_record_take_effect_and_old_ones_keep_their_level():
    clock = Clock()
    limits = Limits()
    limits.adjust(record(requests_per_minute=10), clock)
    limits.enter()
    limits.adjust(record(requests_per_minute=10), clock)
    assert limits.requests.level() == 9
    limits.adjust(record(requests_per_minute=20), clock)
    assert limits.requests.level() == 20
    limits.adjust(record(), clock)
    assert limits.headers() == {}


def test_who_is_refused(opened):
    past = datetime.now(UTC) - timedelta(seconds=1)
    accounts, _ = opened(record(), record("old", "expired", expires=past))
    for key, text in ((None, "no API key"), ("wrong", "not known"), ("expired", "has expired")):
        error = refused(accounts.identify, key)
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert error.headers == {"www-authenticate": "Bearer", "x-should-retry": "false"}
        assert text in str(error)
        assert error.body()["error"]["type"] == "invalid_request_error"


def test_scopes(opened):
    accounts, _ = opened(record(scopes=("infer", "metrics")))
    caller = accounts.identify("key")
    caller.require_scope("metrics")
    error = refused(caller.require_scope, "admin")
    assert (error.status, error.code) == (403, "insufficient_scope")
    assert str(error) == "this key is for infer, metrics, not for admin"


def test_without_keys_all_are_anonymous_without_limits_and_nobody_is_admin():
    caller = Accounts(Settings()).identify("anything")
    for _ in range(100):
        caller.enter()
    caller.reserve(10**6, 10**6)
    assert (caller.name, caller.account) == ("anonymous", "")
    assert (caller.priority, caller.headers()) == (0, {})
    assert caller.may_use_adapter("law")
    error = refused(caller.require_scope, "admin")
    assert (error.status, error.code) == (403, "insufficient_scope")
    assert "none set up" in str(error)


def test_what_a_caller_is(opened):
    accounts, _ = opened(record(priority=3, adapters=("law-*",)))
    caller = accounts.identify("key")
    assert (caller.name, caller.account, caller.priority) == ("alice", "alice", 3)
    assert caller.scopes == ("infer",)
    assert caller.may_use_adapter("law-de@2")
    assert not caller.may_use_adapter("news")


def test_usage_by_key_and_adapter():
    usage = Usage(since=5)
    usage.add("bob", None, 1, 2)
    usage.add("alice", "law", 3, 4)
    usage.add("alice", "law", 10, 20)
    rows = usage.report()["data"]
    assert [(row["key"], row["adapter"]) for row in rows] == [("alice", "law"), ("bob", None)]
    assert rows[0] == {
        "key": "alice",
        "adapter": "law",
        "requests": 2,
        "prompt_tokens": 13,
        "completion_tokens": 24,
    }
    assert usage.report("bob")["data"] == rows[1:]
    assert json.loads(json.dumps(usage.report()))["since"] == 5


def test_usage_is_bounded():
    usage = Usage()
    for number in range(MAX_ROWS + 5):
        usage.add("key", f"adapter{number}", 1, 1)
    usage.add("key", "adapter0", 1, 1)  # known: has a row
    assert len(usage.rows) == MAX_ROWS + 1
    assert usage.rows[OTHER, OTHER].requests == 5
    assert usage.rows["key", "adapter0"].requests == 2
