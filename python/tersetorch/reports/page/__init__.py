"""What became of a model, as one page of HTML that needs no network."""

from tersetorch.reports.page.measurements import Measurements, Rates
from tersetorch.reports.page.page import build_page

__all__ = ["Measurements", "Rates", "build_page"]
