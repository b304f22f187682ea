import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders t5 and clip of tiny encoders."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra text)")
    from tests.text.folders import save_clip, save_t5

    root = tmp_path_factory.mktemp("encoders")
    save_t5(root / "t5")
    save_clip(root / "clip")
    return root
