import pytest


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file and returns its path as text."""

    def write_file(name, content) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file
