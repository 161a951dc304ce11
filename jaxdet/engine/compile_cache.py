"""Compiled programs stay on disk, so that the next process starts faster, to the same bits."""

import jax

from jaxdet.checkpoints.demo import cache_dir
from pallas_kernels.backend import platform_key
from pallas_kernels.compat import reset_compilation_cache

MIN_COMPILE_SECONDS = 0.3


def use_compile_cache() -> None:
    """Turns JAX's persistent compilation cache on, in jaxdet's own folder, unless the user has set it up or off."""
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    folder = cache_dir() / "compiled" / platform_key()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: compile every time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    reset_compilation_cache()  # JAX looks at the setting once, at the process's first compilation
