"""A window that shows frames, with keys and full screen: Tk, which comes with Python."""

from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from pipelines.cli import GrimaceError

if TYPE_CHECKING:
    from pipelines.demo import Frame

INTERRUPT_MS = 100


def show_frames(frames: "Iterator[Frame]", press: Callable[[str], bool], pause: float) -> None:
    """Show frames until they end or the window is closed.

    Args:
        frames: each is asked for when the one before has been shown. One that has a time is shown
            at that time after the first, or as soon as it comes.
        press: is told every key but Esc and f, which are the window's own.
        pause: seconds that a frame without a time stays. A key that meant something asks for the
            next at once; `demo.swap` then gives the same picture, as it now looks.

    Raises:
        GrimaceError: there is no screen, or this Python has no Tk.
        Exception: what the frames or `press` raised; the window is closed then.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        import tkinter

        from PIL import ImageTk

        root = tkinter.Tk(className="grimace")
    except Exception as error:  # a missing library and a missing screen raise different ones
        raise GrimaceError(
            f"no window can be opened ({error}); name a file with --out to write instead, or "
            "install python3-tk"
        ) from error
    root.title("Grimace")
    root.configure(background="black")
    root.geometry("960x720")
    label = tkinter.Label(root, background="black", borderwidth=0)
    label.pack(expand=True, fill="both")
    errors: list[BaseException] = []
    full_screen = False
    shown: Frame | None = None
    waiting, start = "", 0.0

    def after(seconds: float, then: Callable[[], None]) -> None:
        nonlocal waiting
        waiting = root.after(max(1, round(seconds * 1000)), then)

    def advance() -> None:
        nonlocal start
        frame = next(frames, None)
        if frame is None:
            root.destroy()
            return
        if frame.time is None:
            show(frame)
            return
        if shown is None:
            start = monotonic() - frame.time
        after(start + frame.time - monotonic(), lambda: show(frame))

    def show(frame: "Frame") -> None:
        nonlocal shown
        shown = frame
        paint()
        after(pause if frame.time is None else 0.0, advance)

    def paint(_: object = None) -> None:
        if shown is None:
            return
        picture = ImageTk.PhotoImage(Image.fromarray(_fitted(shown.rgb, root)))
        label.configure(image=picture)
        label.image = picture  # type: ignore[attr-defined] # Tk itself holds no reference

    def pressed(event: "tkinter.Event") -> None:
        nonlocal full_screen
        if event.keysym == "Escape":
            root.destroy()
        elif event.keysym == "f":
            full_screen = not full_screen
            root.attributes("-fullscreen", full_screen)
        elif press(event.char) and shown is not None and shown.time is None:
            root.after_cancel(waiting)
            after(0.0, advance)

    def fail(_kind: object, error: BaseException, _trace: object) -> None:
        errors.append(error)  # Tk would print it and go on
        root.destroy()

    def stay_awake() -> None:
        """Let Python see Ctrl-C, which it does not while Tk waits."""
        root.after(INTERRUPT_MS, stay_awake)

    root.report_callback_exception = fail
    root.bind("<Key>", pressed)
    label.bind("<Configure>", paint)  # into and out of full screen
    after(0.0, advance)
    stay_awake()
    root.mainloop()
    if errors:
        raise errors[0]


def _fitted(rgb: np.ndarray, root: "tkinter.Tk") -> np.ndarray:  # type: ignore[name-defined] # noqa: F821
    """As large as the window allows, in the picture's own proportions."""
    width, height = max(root.winfo_width(), 64), max(root.winfo_height(), 64)
    scale = min(width / rgb.shape[1], height / rgb.shape[0])
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    shrinks = scale < 1
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
