"""Data made from data: split, as tokens, and the folders in which made rows are written."""

from vestige.prepare._split import split as split
from vestige.prepare._tokenize import tokenize as tokenize
from vestige.prepare._write import Prepared as Prepared
from vestige.prepare._write import check_same_result as check_same_result
from vestige.prepare._write import claim_result as claim_result
from vestige.prepare._write import fingerprint_of as fingerprint_of
from vestige.prepare._write import read_rows as read_rows
from vestige.prepare._write import row_of as row_of
from vestige.prepare._write import write_prepared as write_prepared
