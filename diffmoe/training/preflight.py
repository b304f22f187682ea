"""The one list of what a run is refused for before it starts; needs neither ranks nor a GPU.

train.py calls it once its ranks have joined, tools/submit.py on the login node before the job is
queued. Only what needs the ranks or their devices is checked elsewhere (start.py).
"""

from typing import Any

from diffmoe.config import Config
from diffmoe.data.fetching import Fetch, check_addresses
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.models import frozen, updates
from diffmoe.parallel.zero import engine_settings
from diffmoe.training import init_from, live_evaluation, validation


def check(config: Config, ds_settings: dict[str, Any], world: int) -> None:
    """Raise UserError for what a run of `world` ranks would fail on.

    config: reconciled with ds_settings, the DeepSpeed JSON.
    """
    config.check_world(world)
    engine_settings(config, ds_settings, world)
    frozen.check(config)
    updates.check(config)
    manifest = check_data(config)
    init_from.check(config, manifest)
    live_evaluation.check(config, manifest)
    validation.check(config, manifest)


def check_data(config: Config) -> Manifest:
    """Hold the shards and their manifest against the configuration."""
    if config.data.path is None:
        raise UserError(
            "data.path is not set: give the folder of shards, data.path=DIR "
            "(python tools/prepare_data.py --help makes one)"
        )
    manifest = Manifest.load(config.data.path)
    check_addresses(config.data.path, manifest, Fetch.of(config.data))
    manifest.check(config.data.path, max_bad_shards=config.data.max_bad_shards)
    manifest.check_model(config.model, config.data.lanes)  # which names the lanes, too
    manifest.check_lanes(config.data.lanes)
    manifest.check_align(config.align)
    return manifest
