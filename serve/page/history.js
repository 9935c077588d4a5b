// What was shown, step by step: pictures that were chosen and edits that were made.

const LONGEST = 40;

/** Steps with one of them current. A new step drops those that were undone. */
export class History {
  #steps = [];
  #at = -1;

  get steps() { return this.#steps; }
  get at() { return this.#at; }
  get current() { return this.#steps[this.#at] ?? null; }
  get canUndo() { return this.#at > 0; }
  get canRedo() { return this.#at < this.#steps.length - 1; }

  /** Add a step behind the current one and make it current. */
  push(step) {
    this.#steps = [...this.#steps.slice(0, this.#at + 1), step].slice(-LONGEST);
    this.#at = this.#steps.length - 1;
  }

  /** Make another step current; nothing happens where there is none. */
  go(to) {
    if (to in this.#steps) this.#at = to;
  }
}
