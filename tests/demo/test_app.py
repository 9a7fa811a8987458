# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP, as gradio's own client calls it; no browser."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm_attn import cli
from vlm_attn.demo import link
from vlm_attn.demo.controls import all_controls

pytest.importorskip("gradio", reason="the demo extra is not installed")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

ROOT = Path(__file__).resolve().parents[2]


def client(page: Any) -> Client:
    return Client(page.local_url, verbose=False, analytics_enabled=False)


def describe(page: Any, **values: Any) -> str:
    """The captions' HTML; what is not given is as the page shows it at first."""
    keys = [control.key for found in all_controls().values() for control in found]
    given = {"path": None, "scene": 3}
    for name, value in values.items():
        given[f"param_{6 + keys.index(name)}" if name in keys else name] = value
    return client(page).predict(**given, api_name="/describe")


def test_describe(page: Any, studio: Any) -> None:
    html = describe(page)
    assert 'aria-label="baseline"' in html
    assert 'aria-label="gift"' in html
    assert "Not in the image: bear" in html
    assert "64 visual tokens" in html
    *_, result = studio.describe(scene_of(3), link.State().prompt, studio.specs(["baseline", "gift"]), 64)
    for run in result.runs:
        for start, end in run.words:
            assert f">{run.text[start:end]}</button>" in html


def scene_of(number: int) -> Any:
    from vlm_attn.demo.studio import scene_picture

    return scene_picture(number)


@pytest.mark.usefixtures("slowly")
def test_streams(page: Any) -> None:
    job = client(page).submit(None, 3, api_name="/describe")
    job.result()
    shown = job.outputs()
    assert len(shown) > 1
    assert "<button" not in shown[0]  # words can be chosen at the end
    assert "<button" in shown[-1]


def test_upload(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jpg"
    Image.new("RGB", (300, 200), (90, 160, 90)).save(file)
    html = describe(page, path=handle_file(file), scene=None, tokens=8)
    assert "not known here" in html
    assert "visual tokens" in html


def test_searches_and_closed_questions(page: Any) -> None:
    """OPERA's caption comes whole; MVP answers questions, and says why it does not describe."""
    html = describe(page, methods=["opera"], tokens=30)
    assert 'aria-label="opera"' in html
    assert "elephant" in html
    with pytest.raises(AppError, match="ask it on the tab Yes or no"):
        describe(page, methods=["mvp"])
    html = client(page).predict(None, 3, ["mvp"], "Is there an elephant in the image?", api_name="/ask")
    assert "right (the truth: yes)" in html


def test_ask(page: Any) -> None:
    html = client(page).predict(
        None, 3, ["baseline", "var+gift"], "Is there an elephant in the image?", api_name="/ask"
    )
    assert html.count("right (the truth: yes)") == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scene": None}, "Choose an image first"),
        ({"scene": 500}, "499"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["gfit"]}, "did you mean 'gift'"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a" * 501}, "501 characters"),
        ({"tokens": 10**6}, "256"),
        ({"gift.enhance_layers": "77"}, "layer 77"),
        ({"gift.enhance_layers": "many"}, "one or more integers"),
    ],
)
def test_errors_are_messages(page: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError) as error:
        describe(page, **values)
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("a.png", "not an image"), ("cut.png", "cut off or broken")])
def test_uploads_that_are_refused(page: Any, tmp_path: Path, name: str, message: str) -> None:
    file = tmp_path / name
    Image.effect_noise((80, 80), 90).save(file)
    file.write_bytes(file.read_bytes()[:900] if name == "cut.png" else b"<svg/>")
    with pytest.raises(AppError, match=message):
        describe(page, path=handle_file(file), scene=None)


def test_upload_of_too_many_bytes(page: Any) -> None:
    for size, status in ((2**20, 200), (11 * 2**20, 413)):
        files = {"files": ("large.png", b"\x89PNG" + bytes(size))}
        assert httpx.post(f"{page.local_url}gradio_api/upload", files=files).status_code == status


def test_addresses_are_not_fetched(page: Any) -> None:
    with pytest.raises(AppError, match="not its address"):
        describe(page, path={"path": f"{page.local_url}favicon.ico", "meta": {"_type": "gradio.FileData"}}, scene=None)


def test_unexpected_errors_are_messages_too(page: Any, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio, "ask", lambda *_: 1 / 0)
    with pytest.raises(AppError, match="Something went wrong .ZeroDivisionError") as error:
        client(page).predict(None, 3, api_name="/ask")
    assert "test_app" not in str(error.value)


def test_maps_need_captions(page: Any) -> None:
    own = client(page)
    with pytest.raises(AppError, match="Describe the image first"):
        own.predict(api_name="/saliency")
    own.predict(None, 3, ["baseline", "divprune"], api_name="/describe")
    for name, word in (("/saliency", "gift"), ("/sinks", "var"), ("/kept", "divprune 6 of 64")):
        image, sentence = own.predict(api_name=name)
        assert Image.open(image).size == (448, 448)
        assert word in sentence
    with pytest.raises(AppError, match="Describe the image first"):  # somebody else's captions stay theirs
        client(page).predict(api_name="/saliency")


VISITORS = """
import json, sys, uuid
from concurrent.futures import ThreadPoolExecutor
import httpx

def visit(number):
    try:
        with httpx.Client(base_url=sys.argv[1], timeout=120) as client:
            client.get("").raise_for_status()
            config, info = (client.get(path).raise_for_status().json() for path in ("config", "gradio_api/info"))
            place = next(d["id"] for d in config["dependencies"] if d["api_name"] == "describe")
            data = [p.get("parameter_default") for p in info["named_endpoints"]["/describe"]["parameters"]]
            data[:3], data[4] = [None, number, ["baseline", "gift"]], 12
            me = uuid.uuid4().hex
            body = {"data": data, "fn_index": place, "session_hash": me}
            client.post("gradio_api/queue/join", json=body).raise_for_status()
            query = {"session_hash": me}
            with client.stream("GET", "gradio_api/queue/data", params=query, timeout=600) as answer:
                for line in answer.iter_lines():
                    message = json.loads(line[5:]) if line.startswith("data:") else {}
                    if message.get("msg") == "process_completed":
                        return "done" if message["success"] else str(message)
        return "no answer"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

with ThreadPoolExecutor(30) as pool:
    print(json.dumps(list(pool.map(visit, range(30)))))
"""


def test_thirty_visitors_on_a_busy_machine(page: Any) -> None:
    """All at once, and all are served, while other programs use every core. How long a page takes is not asserted: the machine
    may be busier still. That it is made once is what `test_the_page_is_made_once_for_all` holds."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", VISITORS, page.local_url], capture_output=True, text=True, check=False, timeout=900
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["done"] * 30


def test_the_page_is_made_once_for_all(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gradio copies for every visitor is answered from memory: with the same bytes, and for every address its own."""
    from gradio import routes

    from vlm_attn.demo.app import SameForAll, serving

    made: list[str] = []
    original = routes.route_utils.update_root_in_config
    monkeypatch.setattr(
        routes.route_utils, "update_root_in_config", lambda config, root: made.append(root) or original(config, root)
    )
    with serving(studio) as own:
        before = len(made)
        assert before  # made before anybody came
        for path in SameForAll.PATHS:
            first, second = (httpx.get(own.local_url.rstrip("/") + path) for _ in range(2))
            assert first.status_code == 200
            assert first.content == second.content
        assert httpx.get(own.local_url + "?scene=5&method=gift").content == httpx.get(own.local_url).content
        assert len(made) == before
        other = httpx.get(own.local_url + "config", headers={"x-forwarded-host": "example.org"}).json()
        assert other["root"] == "http://example.org"
        assert httpx.get(own.local_url + "config").json()["root"] == own.local_url.rstrip("/")
        for number in range(40):  # anybody may send any header: what is kept stays small
            assert httpx.get(own.local_url + "config", headers={"host": f"h{number}.org"}).status_code == 200
        assert httpx.post(own.local_url + "config").status_code == 405


def test_links_of_many_fields_are_refused_calmly(page: Any) -> None:
    own = client(page)
    (restore,) = [d["id"] for d in own.config["dependencies"] if d["api_name"] == "restore"]
    hidden = httpx.post(
        f"{page.local_url}gradio_api/run/restore",
        json={"data": ["&".join(["method=gift"] * 500)], "fn_index": restore},
        timeout=60,
    )
    assert hidden.status_code in (200, 404, 422)
    assert "Traceback" not in hidden.text


@pytest.mark.parametrize("name", ["cdpruner", "trim", "agla"])
def test_visitors_choose_no_files(page: Any, name: str, tmp_path: Path) -> None:
    """Not on the page, not through the API, and not through a link."""
    secret = tmp_path / "secret.pt"
    secret.write_bytes(b"none of yours")
    own = client(page)
    described = own.view_api(return_format="dict")["named_endpoints"]["/describe"]["parameters"]
    assert not any(parameter["label"] == "clip" for parameter in described)
    if name != "agla":
        with pytest.raises(AppError, match=f"{name} asks another model, which who runs this demo has not given"):
            describe(page, methods=[name])
    state, wrong = link.from_query(
        f"method=agla&param={name}.clip=ViT-B-32:{secret}&param=agla.alpha=1", 500, 256, 500, known={"agla.alpha"}
    )
    assert state.params == ("agla.alpha=1",)
    assert wrong == [f"{name}.clip in the link is no setting of this page, and is left out."]


def test_reaches_nothing_else(page: Any) -> None:
    """Only this machine is listened on, only pictures of the page are served, and no address elsewhere is loaded for fonts."""
    assert page.local_url.startswith("http://127.0.0.1:")
    for path in ("/etc/passwd", str(ROOT / "README.md")):
        assert httpx.get(f"{page.local_url}gradio_api/file={path}").status_code in (403, 404)
    assert "fonts.googleapis" not in httpx.get(page.local_url).text
    assert "fonts.googleapis" not in httpx.get(f"{page.local_url}theme.css").text


def test_writes_only_into_a_temporary_folder_that_goes(tmp_path: Path) -> None:
    """In a process of its own: nothing is left in its working folder, its home, the package and the temporary folder."""
    for name in ("work", "home", "temporary"):
        (tmp_path / name).mkdir()
    code = (
        "from pathlib import Path; import os, sys\n"
        "from gradio_client import Client\n"
        "from vlm_attn.demo.app import serving; from vlm_attn.demo.studio import Studio\n"
        "from vlm_attn.evals.models import load_model\n"
        "with serving(Studio(*load_model('scenes', 'cpu'), 'scenes')) as page:\n"
        "    Client(page.local_url, verbose=False, download_files=False).predict(None, 3, api_name='/describe')\n"
        "    print(len(list(Path(os.environ['GRADIO_TEMP_DIR']).rglob('*.png'))), os.environ['GRADIO_TEMP_DIR'])\n"
    )
    before = {path for path in ROOT.rglob("*") if "__pycache__" not in path.parts and ".git" not in path.parts}
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"),
        "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, folder = done.stdout.split()
    assert int(count) > 0
    assert Path(folder).parent == tmp_path / "temporary"
    assert not Path(folder).exists()
    assert [path for path in (tmp_path / "work").rglob("*") if path.is_file()] == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    after = {path for path in ROOT.rglob("*") if "__pycache__" not in path.parts and ".git" not in path.parts}
    assert after - before == set()


class TestCommand:
    def test_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vlm_attn.demo import app

        seen: list[tuple[str, dict[str, Any]]] = []
        monkeypatch.setattr(app, "serve", lambda studio, **options: seen.append((studio.name, options)))
        for arguments in ([], ["--host", "0.0.0.0", "--port", "8123", "--share"]):
            assert CliRunner().invoke(cli.app, ["demo", *arguments]).exit_code == 0
        assert seen == [
            ("scenes", {"host": "127.0.0.1", "port": None, "share": False}),
            ("scenes", {"host": "0.0.0.0", "port": 8123, "share": True}),
        ]

    @pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
    def test_until_it_is_told_to_end(self, tmp_path: Path, ending: signal.Signals) -> None:
        """It says where it is, works, refuses a second one on the same port in one line, and leaves nothing behind."""
        command = [sys.executable, "-m", "vlm_attn.cli", "demo"]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        with (
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # A shell starts its background jobs with Ctrl-C switched off, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            ) as served,
            contextlib.ExitStack() as last,
        ):
            last.callback(served.kill)  # else a failure waits for ever
            assert served.stdout is not None
            line = next(line for line in served.stdout if "Running" in line)
            address = line.split()[2]
            assert httpx.get(address).status_code == 200
            assert list(tmp_path.glob("vlm-attn-demo-*"))
            if ending is signal.SIGINT:
                port = address.rstrip("/").rpartition(":")[2]
                second = subprocess.run(
                    [*command, "--port", port], capture_output=True, text=True, check=False, env=environment
                )
                assert second.returncode == 2
                said = second.stderr.splitlines()[-1]  # other libraries may have warned before
                assert said.startswith("Error: ")
                assert port in said
                assert "Traceback" not in second.stderr
            served.send_signal(ending)
            assert served.wait(60) == 0
        assert not list(tmp_path.glob("vlm-attn-demo-*"))

    def test_without_gradio(self) -> None:
        code = (
            "import sys; sys.modules['gradio'] = None\n"
            "from vlm_attn import cli; sys.argv = ['vlm-attn', 'demo', '--model', 'none/such']; cli.main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == 'Error: gradio is not installed, and this needs it: pip install "vlm-attn[demo]"\n'

    def test_gradio_is_not_imported_for_anything_else(self) -> None:
        code = "import sys, vlm_attn.demo.studio, vlm_attn.cli; vlm_attn.patch; print('gradio' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"
