"""Secrets stay out of what is shown and stored, and names cannot steer a terminal."""

import pytest

from diffmoe.redaction import printable, redact


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/data/imagenet", "/data/imagenet"),
        ("photos@2x/a?b#c", "photos@2x/a?b#c"),
        ("https://host:8080/x@y/{}", "https://host:8080/x@y/{}"),
        ("https://user:s3cret@host/x", "https://***@host/x"),
        ("https://s3cret@host/x", "https://***@host/x"),
        ("s3://KEY:se/cr+et@bucket/x", "s3://***@bucket/x"),
        ("https://h/{}?sig=s3cret&X-Amz-Date=1", "https://h/{}?sig=***&X-Amz-Date=***"),
        ("https://h/x?s3cret#s3cret", "https://h/x?***#***"),
        ("cannot open https://u:s3cret@h/x?t=s3cret now", "cannot open https://***@h/x?t=*** now"),
        ("pipe:aws s3 cp s3://bucket/{} -", "pipe:aws s3 cp s3://bucket/{} -"),
        ("pipe:cat /data/{}", "pipe:cat /data/{}"),
        (
            "pipe:curl -s -H 'Authorization: Bearer s3cret' https://h/{}?token=s3cret",
            "pipe:curl -s -H *** https://h/{}?token=***",
        ),
        ("pipe:TOKEN=s3cret fetch --key=s3cret {}", "pipe:*** fetch *** {}"),
        ("pipe:wget --user me --password s3cret {}", "pipe:wget --user *** --password *** {}"),
        ("pipe:sshpass -ps3cret ssh me@host", "pipe:sshpass ***"),
        ("pipe:curl 's3cret", "pipe:***"),
    ],
)
def test_no_secret_of_a_location_is_shown(location: str, shown: str):
    assert redact(location) == shown
    assert "s3cret" not in redact(location)
    assert redact(shown) == shown


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a\x1b[31mred\nb\x9bc\u202ed\udc80") == r"a\x1b[31mred\nb\x9bc\u202ed\udc80"
    assert printable("Entlebucher Sennenhund, 恩特雷布赫") == "Entlebucher Sennenhund, 恩特雷布赫"
