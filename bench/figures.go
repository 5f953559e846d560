package main

import (
	"errors"
	"fmt"
	"image/color"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// figures draws what is in the report, as PNG and SVG, into dir.
func (r *swarmReport) figures(dir string) error {
	whole := func(transport string) bool {
		return !strings.HasSuffix(transport, slowSuffix) && !strings.Contains(transport, lossSuffix)
	}
	rows := filter(r.Rows, func(row swarmRow) bool { return row.TOverIdeal > 0 && whole(row.Transport) })
	curves := filter(r.Curves, func(c curve) bool { return whole(c.Transport) })
	if len(curves) == 0 {
		return nil
	}
	largest := slices.MaxFunc(curves, func(a, b curve) int { return a.N - b.N }).N
	curves = filter(curves, func(c curve) bool { return c.N == largest })
	times, err := timeFigure(rows)
	if err != nil {
		return err
	}
	sum, err := sumFigure(curves)
	if err != nil {
		return err
	}
	var grid [][]*plot.Plot
	const columns = 2
	for i, c := range curves {
		p, err := rateFigure(c)
		if err != nil {
			return err
		}
		if i%columns == 0 {
			grid = append(grid, make([]*plot.Plot, columns))
		}
		grid[i/columns][i%columns] = p
	}
	return errors.Join(
		save(filepath.Join(dir, "time"), [][]*plot.Plot{{times}}),
		save(filepath.Join(dir, "rates"), grid),
		save(filepath.Join(dir, "bandwidth"), [][]*plot.Plot{{sum}}))
}

func filter[T any](all []T, keep func(T) bool) (kept []T) {
	for _, v := range all {
		if keep(v) {
			kept = append(kept, v)
		}
	}
	return kept
}

// timeFigure is the time to the last node against the number of nodes.
func timeFigure(rows []swarmRow) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = "Time until the last node has all of it"
	p.X.Label.Text = "nodes"
	p.Y.Label.Text = "time / time that one link needs for one copy"
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.Legend.Top, p.Legend.Left = true, true
	by := map[string]plotter.XYs{}
	counts := map[int]bool{}
	for _, row := range rows {
		by[row.Transport] = append(by[row.Transport], plotter.XY{X: float64(row.N), Y: row.TOverIdeal})
		counts[row.N] = true
	}
	for _, name := range slices.Sorted(maps.Keys(by)) {
		points := by[name]
		slices.SortFunc(points, func(a, b plotter.XY) int { return int(a.X - b.X) })
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return nil, err
		}
		line.Color, dots.Color, dots.Shape = hue(name), hue(name), draw.CircleGlyph{}
		line.Width = vg.Points(1.5)
		p.Add(line, dots)
		p.Legend.Add(name, line, dots)
	}
	at := slices.Sorted(maps.Keys(counts))
	p.X.Tick.Marker = ticks(at...)
	// One number alone would have an axis from 0, which has no logarithm.
	p.X.Min, p.X.Max = float64(at[0])/1.1, float64(at[len(at)-1])*1.1
	p.Y.Tick.Marker = ticks(1, 2, 3, 5, 10, 20, 50)
	p.Y.Min, p.Y.Max = min(p.Y.Min, 1), max(p.Y.Max, 2)
	p.Add(plotter.NewGrid())
	return p, nil
}

func ticks(at ...int) plot.ConstantTicks {
	var list plot.ConstantTicks
	for _, n := range at {
		list = append(list, plot.Tick{Value: float64(n), Label: strconv.Itoa(n)})
	}
	return list
}

// rateFigure is what each node of a bout received over time.
func rateFigure(c curve) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s, %d nodes", c.Transport, c.N)
	p.X.Label.Text = "s"
	p.Y.Label.Text = "Mbit/s received, each node"
	p.X.Min, p.Y.Min, p.Y.Max = 0, 0, 1.25*float64(c.Mbit)
	for _, node := range c.Rates {
		line, err := plotter.NewLine(smooth(node, c.Every))
		if err != nil {
			return nil, err
		}
		line.Color, line.Width = faint(hue(c.Transport)), vg.Points(0.5)
		p.Add(line)
	}
	p.Add(plotter.NewGrid())
	return p, nil
}

// sumFigure is what all nodes together received over time.
func sumFigure(curves []curve) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = fmt.Sprintf("What %d nodes receive together", curves[0].N)
	p.X.Label.Text = "s"
	p.Y.Label.Text = "Mbit/s"
	p.X.Min, p.Y.Min = 0, 0
	p.Legend.Top = true
	for _, c := range curves {
		line, err := plotter.NewLine(smooth(sum(c.Rates), c.Every))
		if err != nil {
			return nil, err
		}
		line.Color, line.Width = hue(c.Transport), vg.Points(1.5)
		p.Add(line)
		p.Legend.Add(c.Transport, line)
	}
	p.Add(plotter.NewGrid())
	return p, nil
}

// sum adds up what is of the same time.
func sum(rates [][]float64) []float64 {
	var all []float64
	for _, node := range rates {
		for i, rate := range node {
			if i == len(all) {
				all = append(all, 0)
			}
			all[i] += rate
		}
	}
	return all
}

// smooth gives each sample the mean of it and its neighbours in two seconds:
// what a queue lets go at once is no rate.
func smooth(rates []float64, every float64) plotter.XYs {
	points := plotter.XYs{{}}
	for i := range rates {
		from, to := max(0, i-2), min(len(rates), i+3)
		mean := 0.0
		for _, rate := range rates[from:to] {
			mean += rate / float64(to-from)
		}
		points = append(points, plotter.XY{X: (float64(i) + 0.5) * every, Y: mean})
	}
	return points
}

// hues of the systems, in their order.
var hues = []color.RGBA{
	{214, 39, 40, 255}, {44, 160, 44, 255}, {148, 103, 189, 255}, {255, 127, 14, 255}, {190, 170, 20, 255}, {31, 119, 180, 255}, {110, 80, 70, 255},
}

// hue is the same for a system in all figures.
func hue(transport string) color.RGBA {
	return hues[max(0, slices.Index(names(), transport))%len(hues)]
}

func faint(c color.RGBA) color.Color { return color.NRGBA{c.R, c.G, c.B, 140} }

// save draws plots in rows and columns into file.png and file.svg.
func save(file string, grid [][]*plot.Plot) error {
	width, height := vg.Length(len(grid[0]))*14*vg.Centimeter, vg.Length(len(grid))*9*vg.Centimeter
	for _, format := range []string{"png", "svg"} {
		canvas, err := draw.NewFormattedCanvas(width, height, format)
		if err != nil {
			return err
		}
		tiles := draw.Tiles{Rows: len(grid), Cols: len(grid[0]), PadX: vg.Millimeter, PadY: vg.Millimeter, PadRight: 2 * vg.Millimeter}
		for i, line := range plot.Align(grid, tiles, draw.New(canvas)) {
			for j, c := range line {
				if grid[i][j] != nil {
					grid[i][j].Draw(c)
				}
			}
		}
		f, err := os.Create(file + "." + format)
		if err != nil {
			return err
		}
		_, err = canvas.WriteTo(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
