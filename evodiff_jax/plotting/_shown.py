"""A figure that a notebook shows; this module needs matplotlib, the others of the room import it where they draw."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure of no window and no pyplot, which IPython asks for its picture."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
