"""How far scores, and what they are computed from, can be trusted: one function for each kind of evaluation."""

from vestige.evaluate._families import PUBLISHED as PUBLISHED
from vestige.evaluate._families import Family as Family
from vestige.evaluate._measures import Quality as Quality
from vestige.evaluate._measures import quality as quality
from vestige.evaluate._products import Products as Products
from vestige.evaluate._products import Rows as Rows
from vestige.evaluate._products import Samples as Samples
from vestige.evaluate._products import Source as Source
from vestige.evaluate._products import exact_products as exact_products
from vestige.evaluate._products import projected_products as projected_products
from vestige.evaluate._products import sketched_products as sketched_products
from vestige.evaluate._sketch import sketch as sketch
from vestige.evaluate._sketch_report import SketchPoint as SketchPoint
from vestige.evaluate._sketch_report import SketchReport as SketchReport
