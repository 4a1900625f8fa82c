"""A folder served in this process, as the browser of its user asks for it."""

from pathlib import Path

from starlette.testclient import TestClient

from vestige.workspace import make_app

PORT, TOKEN = 8000, "secret"
ORIGIN = f"http://127.0.0.1:{PORT}"


def serve(folder: Path) -> TestClient:
    """The server of a folder, and no cookie yet."""
    return TestClient(make_app(folder, token=TOKEN, port=PORT), base_url=ORIGIN)


def visit(folder: Path) -> TestClient:
    """The same after the address with the token was opened."""
    client = serve(folder)
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client
