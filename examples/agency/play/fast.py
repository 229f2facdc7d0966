"""The agency in fast motion: it waits for a tenth of a second, and not eight, whether a lead goes on writing."""

from dataclasses import replace
from datetime import timedelta

from agency import agency as real

agency = replace(real, debounce=timedelta(milliseconds=100))
