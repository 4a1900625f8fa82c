from tests.reports.conftest import chromium as chromium
