"""Silence what the libraries below training print, because each stage shows one progress bar of its own."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from loguru import logger as loguru_logger
from transformers.utils import logging as transformers_logging

# These warn of what a user of this package has chosen: a CPU, the default layers and the full vocabulary.
_NO_NEWS = (
    ".*'pin_memory' argument is set as true",
    "In CPU autocast",
    "--target-layer-ids is not explicitly set",
    "No vocab mappings found",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of Hugging Face and what speculators logs in every run. Warnings and errors stay."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NO_NEWS)

    bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    loguru_logger.disable("speculators")
    logging.getLogger("speculators.train.cli").addFilter(is_news)
    try:
        with warnings.catch_warnings():
            for text in _NO_NEWS:
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        logging.getLogger("speculators.train.cli").removeFilter(is_news)
        loguru_logger.enable("speculators")
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()
