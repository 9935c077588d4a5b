// Where to edit: painted over the image, sent as a PNG of the image's size with alpha 0 where it was painted.

const PAINT = "rgb(236 72 153)";

/** A brush on a canvas that lies over the image. */
export class Mask {
  #canvas;
  #context;
  #last = null;
  #erasing = false;
  empty = true;
  size = 12; // of the brush, in hundredths of the image's longer side

  constructor(canvas, onChange) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#last = this.#place(event);
      this.#stroke(this.#last);
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.#last) this.#stroke(this.#place(event));
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => {
        if (this.#last) onChange();
        this.#last = null;
      });
    }
  }

  /** Begin with nothing painted, for an image of some size in pixels. */
  reset(width, height) {
    this.#canvas.width = width;
    this.#canvas.height = height;
    this.empty = true;
  }

  /** Take away what is painted. */
  clear() {
    this.reset(this.#canvas.width, this.#canvas.height);
  }

  erase(erasing) {
    this.#erasing = erasing;
  }

  #place(event) {
    const box = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.#canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.#canvas.height,
    };
  }

  #stroke(to) {
    const pen = this.#context;
    pen.globalCompositeOperation = this.#erasing ? "destination-out" : "source-over";
    pen.lineWidth = (this.size / 100) * Math.max(this.#canvas.width, this.#canvas.height);
    pen.lineCap = "round";
    pen.strokeStyle = PAINT;
    pen.beginPath();
    pen.moveTo(this.#last.x, this.#last.y);
    pen.lineTo(to.x, to.y);
    pen.stroke();
    this.#last = to;
    if (!this.#erasing) this.empty = false;
  }

  /** The mask as a Blob; null where nothing is painted. */
  async png() {
    if (this.empty) return null;
    const { width, height } = this.#canvas;
    const image = this.#context.getImageData(0, 0, width, height);
    for (let place = 0; place < image.data.length; place += 4) {
      const painted = image.data[place + 3] >= 128; // the edge of a stroke is soft, a mask's is not
      image.data.fill(0, place, place + 3);
      image.data[place + 3] = painted ? 0 : 255;
    }
    const sheet = new OffscreenCanvas(width, height);
    sheet.getContext("2d").putImageData(image, 0, 0);
    return sheet.convertToBlob({ type: "image/png" });
  }
}
