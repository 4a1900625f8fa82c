import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.errors import CorruptFile
from vestige.tables import read_table, reading

SCHEMA = pa.schema([("id", pa.string()), ("row", pa.int64()), ("score", pa.float64())])


def read(path):
    return read_table(path, SCHEMA, "Make it again.", required=("id", "row"))


@pytest.fixture
def path(tmp_path):
    parquet.write_table(
        pa.table({"row": pa.array([0, 1], pa.int32()), "id": ["a", "b"], "more": [1, 2]}), tmp_path / "t"
    )
    return tmp_path / "t"


def test_a_table_has_the_types_of_its_schema_and_what_may_be_missing_is_null(path):
    table = read(path)
    assert [table.schema.field(name).type for name in SCHEMA.names] == SCHEMA.types
    assert table["score"].to_pylist() == [None, None]
    assert table["more"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"id": ["a"]}, "lacks the columns row"),
        ({"id": ["a", None], "row": [0, 1]}, "row 1: `id` is empty"),
        ({"id": ["a"], "row": ["x"]}, "cannot be read"),
        ({"id": ["a"], "row": [[1]]}, "cannot be read"),
    ],
)
def test_another_table_is_named_with_what_is_wrong(columns, reason, path):
    parquet.write_table(pa.table(columns), path)
    with pytest.raises(CorruptFile, match=f"{path.name}.*{reason}.*Make it again"):
        read(path)


def test_a_torn_file_is_named(path):
    content = path.read_bytes()
    for part in (b"", b"PAR1", content[: len(content) // 2], content[:-20] + b"\xff" * 12 + content[-8:]):
        path.write_bytes(part)
        with pytest.raises(CorruptFile, match="cannot be read"):
            read(path)


def test_what_a_library_says_names_the_file(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(CorruptFile, match=r"x\.bin cannot be read .*Make it again"), reading(path, "Make it again."):
        raise KeyError("scores")
