// Measures the reports in the frames of this page, and writes what it saw as JSON.

function measure(frame) {
    const page = frame.contentDocument;
    const box = element => element.getBoundingClientRect();
    const seen = {
        width: frame.clientWidth, cut: [], overlaps: [], broken: [], smallest: Infinity, badge: null,
        overflow: page.documentElement.scrollWidth > frame.clientWidth,
    };
    const badge = page.querySelector(".badge");
    if (badge && box(badge).height > 0) seen.badge = box(badge).top;
    for (const drawing of page.querySelectorAll("svg")) {
        const edge = box(drawing);
        const texts = [...drawing.querySelectorAll("text")].filter(text => text.textContent.trim());
        const boxes = texts.map(box);
        texts.forEach((text, at) => {
            const b = boxes[at];
            const name = text.textContent;
            seen.smallest = Math.min(seen.smallest, b.height);
            const outside = b.left < edge.left - 1 || b.right > edge.right + 1 || b.top < edge.top - 1 || b.bottom > edge.bottom + 1;
            if (outside) seen.cut.push(name);
            boxes.slice(0, at).forEach((o, other) => {
                const across = Math.min(b.right, o.right) - Math.max(b.left, o.left);
                const down = Math.min(b.bottom, o.bottom) - Math.max(b.top, o.top);
                // Line boxes have some room above and below the letters.
                if (across > 1 && down > 0.3 * Math.min(b.height, o.height)) {
                    seen.overlaps.push(`${texts[other].textContent} | ${name}`);
                }
            });
        });
    }
    // A word of a table that lies in two lines. A path has to break somewhere.
    for (const cell of page.querySelectorAll("td, th")) {
        const walker = page.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            for (const word of node.data.matchAll(/[A-Za-z0-9_]+/g)) {
                const around = node.data.slice(0, word.index).match(/\S*$/)[0] + node.data.slice(word.index).match(/^\S*/)[0];
                if (around.includes("/")) continue;
                const range = page.createRange();
                range.setStart(node, word.index);
                range.setEnd(node, word.index + word[0].length);
                const lines = new Set([...range.getClientRects()].map(line => Math.round(line.top)));
                if (lines.size > 1) seen.broken.push(word[0]);
            }
        }
    }
    if (!page.querySelector("svg text")) seen.smallest = 99;
    return seen;
}

window.addEventListener("load", () => {
    const frames = [...document.querySelectorAll("iframe")];
    document.querySelector("#seen").textContent = JSON.stringify(frames.map(measure));
});
