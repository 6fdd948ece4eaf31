"""A hub that cannot be reached costs one short question, and one line."""

import socket
import subprocess
import sys
import time

import datasets
import pytest
from helpers.command_line import Run, one_line_error
from huggingface_hub import constants

from switchkd.data import load_records
from switchkd.errors import UserError
from switchkd.models import hub
from switchkd.models.loading import load_model, load_tokenizer


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The switch that keeps tests offline is off, the hub's address is one where nobody listens, the cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._asked.cache_clear()
    yield
    hub._asked.cache_clear()


def refused(load, *arguments):
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert time.perf_counter() - started < 5
    return str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(no_hub, load):
    """It took 49 seconds: six attempts for each of two files, and a line on standard error for every one."""
    message = refused(load, "owner/name")
    assert message.startswith(
        f"cannot load {'model' if load is load_model else 'tokenizer'} 'owner/name': no such folder"
    )
    assert "the hub http://127.0.0.1:9 cannot be reached" in message and message.endswith("give a local path")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_a_data_set_of_a_hub_that_cannot_be_reached_is_one_line_at_once(no_hub):
    message = refused(load_records, "owner/name")
    assert "'owner/name' is not a local file or folder" in message and "cannot be reached" in message
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_the_command_says_it_in_one_line(no_hub, run: Run):
    error = one_line_error(*run("rollout", "--model_name_or_path", "demo", "--policy", "student", "--prompt", "a"))
    assert "no such folder here" in error and "cannot be reached" in error


@pytest.mark.parametrize("name", ["runs/demo", "./demo", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(no_hub, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)  # `make demo` leaves runs/demo in a checkout
    monkeypatch.setattr(hub, "problem", lambda: pytest.fail("asked the hub"))
    assert f"folder {name} does not exist" in refused(load_model, name)
    assert f"no file or folder {name}" in refused(load_records, name)


def test_what_is_in_the_cache_is_read_where_the_hub_cannot_be_reached(no_hub, models, tmp_path):
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(models / "student", target_is_directory=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    started = time.perf_counter()
    assert load_model("owner/name").config.n_layer == 2
    assert load_tokenizer("owner/name")("a")["input_ids"]
    assert time.perf_counter() - started < 5


def test_an_answer_of_any_kind_means_the_hub_is_there(no_hub, monkeypatch):
    class Session:
        def head(self, url, timeout):
            return None

    monkeypatch.setattr(hub, "get_session", Session)
    assert hub.problem() is None
    with hub.cache_only_if_unreachable():
        assert not constants.HF_HUB_OFFLINE


def test_the_hub_is_asked_once_a_minute(no_hub, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise ConnectionError("no route")

    monkeypatch.setattr(hub, "get_session", Session)
    assert [hub.problem() for _ in range(3)] == ["no route"] * 3
    assert asked in ([hub.PATIENCE], [hub.PATIENCE] * 2)  # two where a minute began in between


# ---- no test reaches another machine

TRIES = """
import socket, urllib.request
for call in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.1),
    lambda: urllib.request.urlopen("http://example.com", timeout=0.1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        call()
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("where", ["here", "in another process"])
def test_the_guard_sees_every_try_to_reach_another_machine(tmp_path, monkeypatch, capfd, where):
    """It looks at the whole suite: nothing that switchkd does sends anything anywhere."""
    monkeypatch.setenv("SWITCHKD_TRIED", str(tmp_path / "tried"))
    if where == "here":
        exec(TRIES, {})
    else:
        subprocess.run([sys.executable, "-c", TRIES], check=True, timeout=60)
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 3 and all("a test tried to reach" in line for line in said), said
    assert len((tmp_path / "tried").read_text().splitlines()) == 3
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
